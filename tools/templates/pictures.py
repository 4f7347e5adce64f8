"""The tiles' pictures: what each template makes on the small model, with the photos it makes it from."""

from __future__ import annotations

import json

import numpy
from PIL import Image, ImageDraw, ImageFont

from tools.find_comfyui import ROOT
from tools.server import ComfyServer
from tools.templates import LIST, Template
from tools.templates.__main__ import EXAMPLES

SIDE, PHOTO, EDGE = 420, 118, 4  # pixels: a tile, a photo in its corner, the photo's white edge


def draw(server: ComfyServer) -> None:
    """Run every template of the small model, in order, and write the tiles of all bases.

    Raises:
        ServerError: a template failed.
    """
    for path in EXAMPLES.glob("*.png"):
        server.upload(path)
    for template in LIST:
        if template.base.name != "small":
            continue
        photos, made = draw_one(server, template)
        tile = compose(numpy.concatenate(made, axis=1), photos)
        if template.feature.key == "batch":
            pictures = [Image.fromarray(one) for one in made]
            banner(photos, pictures).save(ROOT / "assets/banner.png", optimize=True)
        for other in LIST:
            if other.feature is template.feature:
                tile.save(other.picture, quality=88, optimize=True)


def draw_one(server: ComfyServer, template: Template) -> tuple[list[Image.Image], list[numpy.ndarray]]:
    """The photos that a template loads, and the pictures ``(H, W, 3)`` that it saves."""
    prompt = json.loads(template.api.read_text("utf-8"))
    run = server.run(prompt)
    names = [node["inputs"]["image"] for node in prompt.values() if node["class_type"] == "LoadImage"]
    saved = [key for key, node in prompt.items() if node["class_type"] == "FeedFaceSaveImage"]
    photos = [Image.open(EXAMPLES / name).convert("RGB") for name in names]
    return photos, [one for key in saved for one in server.pictures(run, key)]


def compose(made: numpy.ndarray, photos: list[Image.Image]) -> Image.Image:
    """A square tile: the picture, and below it or in its corner the photos."""
    height, width = made.shape[:2]
    scale = SIDE / max(width, height)
    tile = Image.new("RGB", (SIDE, SIDE), "#202020")
    picture = Image.fromarray(made).resize((round(width * scale), round(height * scale)), Image.LANCZOS)
    tile.paste(picture, (0, 0))
    side = min(PHOTO, (SIDE - 10) // max(len(photos), 1) - 10)
    if picture.height < SIDE - 80:  # room for them below it
        side = min((SIDE - 10) // max(len(photos), 1) - 10, SIDE - picture.height - 20, 190)
    for index, photo in enumerate(photos):
        framed = Image.new("RGB", (side, side), "white")
        framed.paste(photo.resize((side - 2 * EDGE, side - 2 * EDGE), Image.LANCZOS), (EDGE, EDGE))
        below = picture.height + (SIDE - picture.height - side) // 2
        tile.paste(framed, (10 + index * (side + 10), below if picture.height < SIDE - 80 else SIDE - side - 10))
    return tile


def banner(photos: list[Image.Image], made: list[Image.Image]) -> Image.Image:
    """The registry's banner, 21:9: a photo and what became of it, for each of three people."""
    page = Image.new("RGB", (1260, 540), "#17202e")
    pen = ImageDraw.Draw(page)
    pen.text((60, 44), "FeedFace", "#f8fafc", ImageFont.load_default(76))
    pen.text((60, 140), "one photo of a person, any picture of them", "#5eead4", ImageFont.load_default(34))
    for index, (photo, picture) in enumerate(zip(photos, made, strict=True)):
        x = 60 + index * 390
        page.paste(photo.resize((130, 130), Image.LANCZOS), (x, 350))
        page.paste(picture.resize((230, 230), Image.LANCZOS), (x + 130, 250))
    return page
