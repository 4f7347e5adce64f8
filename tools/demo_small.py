"""Three people × four prompts in a real ComfyUI, without and with the face, as one sheet with the examiner's scores.

The people are held out: no part of the small system was trained on them. Everything goes through the nodes that any
model uses; only the first one, FeedFace Small Model, is special.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageDraw, ImageFont

from examples.small_model import system
from examples.small_model.drawing import to_pixels
from examples.small_model.evaluate import Examination
from examples.small_model.showcase import read_people
from feedface_core.files.provenance import mark_file
from tools.comfyui import device_arguments, installed_comfyui
from tools.demo_graph import comparison_graph, node
from tools.find_comfyui import version_of
from tools.server import ComfyServer

PROMPTS = (
    "a portrait of a smiling person wearing a red shirt, plain blue background",
    "a close-up of a serious person wearing glasses and a black vest, plain orange background",
    "a portrait of an angry person wearing a headband and a white shirt, striped green background",
    "a close-up of a surprised person wearing a yellow vest, dotted purple background",
)
DETECTION = {"detector": "mtcnn", "order": "confidence", "min_size": 16, "crop_size": 48}
SAMPLER = {"steps": 20, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "normal"}


def person_graph(names: list[str], prompts: tuple[str, ...] = PROMPTS, seed: int = 1) -> dict[str, Any]:
    """The graph for one person, in API format: each prompt without and with the face, from the same noise.

    Args:
        names: the uploaded references.
    """
    loader, adapter = node("FeedFaceSmallModel"), Path(system.ADAPTER).name
    return comparison_graph(loader, adapter, names, prompts, DETECTION, SAMPLER, system.picture_size(), seed)


def draw_people(output: Path, seed: int = 1, mark: bool = True) -> Path:
    """Draws the sheet; returns its file, marked as generated or not.

    Raises:
        ServerError: no ComfyUI, or a graph failed.
        TrainerError: the small model is not there.
    """
    comfyui = installed_comfyui("demo")
    people, examination, rows, began = read_people(), Examination.load(), [], time.monotonic()
    with ComfyServer(comfyui, arguments=device_arguments()) as server:
        print(f"ComfyUI {version_of(comfyui)} with FeedFace after {time.monotonic() - began:.0f} s", flush=True)
        for person in people:
            run = server.run(person_graph([server.upload(path) for path in person.references], seed=seed))
            row: dict[str, Any] = {"references": [read_picture(path) for path in person.references]}
            for kind in ("plain", "face"):
                pictures = [server.pictures(run, f"{kind}{i}")[0] for i in range(len(PROMPTS))]
                row |= {
                    kind: pictures,
                    f"{kind}_scores": examination.compare(to_pixels(numpy.stack(pictures)), person.index),
                }
            rows.append(row)
            plain, face = (sum(nearer == 0 for _, nearer in row[f"{kind}_scores"]) for kind in ("plain", "face"))
            print(
                f"person {person.index}: named among {len(examination.gallery)} in {face} of {len(PROMPTS)} pictures "
                f"with the face, {plain} without; {time.monotonic() - began:.0f} s",
                flush=True,
            )
    output.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(output / "people.png")
    if mark:
        mark_file(output / "people.png")
    return output / "people.png"


def sheet(rows: list[dict[str, Any]], prompts: tuple[str, ...] = PROMPTS) -> Image.Image:
    """One row a person: four references, then for each prompt the picture without and with the face and its score."""
    cell, gap, top, line = 192, 12, 62, 20
    width = cell + (2 * cell + gap) * len(prompts) + 2 * gap
    page = Image.new("RGB", (width, top + len(rows) * (cell + line + gap)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    pen.text((gap // 2, 44), "references", "gray", font)
    for i, prompt in enumerate(prompts):
        x = cell + 2 * gap + i * (2 * cell + gap)
        scene, _, background = prompt.partition(", ")
        who, _, worn = scene.partition(" wearing ")
        pen.text((x, 4), f"{who}, {background}", "black", font)
        pen.text((x, 22), f"wearing {worn}", "black", font)
        pen.text((x, 44), "without the face", "gray", font)
        pen.text((x + cell, 44), "with the face", "gray", font)
    for r, row in enumerate(rows):
        y = top + r * (cell + line + gap)
        for k, reference in enumerate(row["references"]):
            page.paste(scaled(reference, cell // 2), (gap // 2 + k % 2 * cell // 2, y + k // 2 * cell // 2))
        pen.text((gap // 2, y + cell + 1), f"person {r + 1}", "black", font)
        for i in range(len(prompts)):
            x = cell + 2 * gap + i * (2 * cell + gap)
            for k, kind in enumerate(("plain", "face")):
                page.paste(scaled(row[kind][i], cell), (x + k * cell, y))
                score, nearer = row[f"{kind}_scores"][i]
                told = "this person" if nearer == 0 else f"{nearer + 1}. guess"
                colour = "#0a7a2f" if nearer == 0 else "gray"
                pen.text((x + k * cell, y + cell + 1), f"{score:+.2f}  {told}", colour, font)
    return page


def read_picture(path: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path).convert("RGB"))


def scaled(picture: numpy.ndarray, side: int) -> Image.Image:
    return Image.fromarray(picture).resize((side, side), Image.LANCZOS)
