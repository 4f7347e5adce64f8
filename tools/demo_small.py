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
from examples.small_model.showcase import Judge, read_people
from tools.comfyui import device_arguments, installed_comfyui
from tools.find_comfyui import version_of
from tools.server import ComfyServer

PROMPTS = (
    "a portrait of a smiling person wearing a red shirt, plain blue background",
    "a close-up of a serious person wearing glasses and a black vest, plain orange background",
    "a portrait of an angry person wearing a headband and a white shirt, striped green background",
    "a close-up of a surprised person wearing a yellow vest, dotted purple background",
)
SIZE, STEPS, CFG = 64, 20, 3.0
ADAPTER = Path(system.ADAPTER).name


def workflow(names: list[str], prompts: tuple[str, ...] = PROMPTS, seed: int = 1) -> dict[str, Any]:
    """The graph for one person, in API format: each prompt without and with the face, from the same noise.

    Args:
        names: the uploaded references.
    """

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    graph = {
        "small": node("FeedFaceSmallModel"),
        "negative": node("CLIPTextEncode", clip=["small", 1], text=""),
        "latent": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        "adapter": node("FeedFaceLoadAdapter", adapter_name=ADAPTER),
    }
    photos = ["photo0", 0]
    for i, name in enumerate(names):
        graph[f"photo{i}"] = node("LoadImage", image=name)
        if i:
            graph[f"photos{i}"] = node("ImageBatch", image1=photos, image2=[f"photo{i}", 0])
            photos = [f"photos{i}", 0]
    graph["crops"] = node(
        "FeedFaceDetectFaces",
        image=photos,
        detector="mtcnn",
        order="confidence",
        indexes="0",
        min_size=16,
        when_none="error",
        crop_size=48,
    )
    graph["face"] = node("FeedFaceEncodeFaces", adapter=["adapter", 0], crops=["crops", 0])
    graph["apply"] = node(
        "FeedFaceApply", model=["small", 0], adapter=["adapter", 0], face=["face", 0], strength=1.0, start=0.0, end=1.0
    )
    for i, prompt in enumerate(prompts):
        graph[f"prompt{i}"] = node("CLIPTextEncode", clip=["small", 1], text=prompt)
        for kind, model in (("plain", "small"), ("face", "apply")):
            graph[f"{kind}_latent{i}"] = node(
                "KSampler",
                model=[model, 0],
                positive=[f"prompt{i}", 0],
                negative=["negative", 0],
                latent_image=["latent", 0],
                seed=seed + i,
                steps=STEPS,
                cfg=CFG,
                sampler_name="dpmpp_2m",
                scheduler="normal",
                denoise=1.0,
            )
            graph[f"{kind}_picture{i}"] = node("VAEDecode", samples=[f"{kind}_latent{i}", 0], vae=["small", 2])
            graph[f"{kind}{i}"] = node("SaveImage", images=[f"{kind}_picture{i}", 0], filename_prefix=f"{kind}{i}")
    return graph


def sheet(rows: list[dict[str, Any]], prompts: tuple[str, ...] = PROMPTS, zoom: int = 3) -> Image.Image:
    """One row a person: four references, then for each prompt the picture without and with the face and its score."""
    cell, gap, top, line = SIZE * zoom, 12, 62, 20
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
            small = Image.fromarray(reference).resize((cell // 2, cell // 2), Image.LANCZOS)
            page.paste(small, (gap // 2 + k % 2 * cell // 2, y + k // 2 * cell // 2))
        pen.text((gap // 2, y + cell + 1), f"person {r + 1}", "black", font)
        for i in range(len(prompts)):
            x = cell + 2 * gap + i * (2 * cell + gap)
            for k, kind in enumerate(("plain", "face")):
                picture = Image.fromarray(row[kind][i]).resize((cell, cell), Image.LANCZOS)
                page.paste(picture, (x + k * cell, y))
                score, nearer = row[f"{kind}_scores"][i]
                told = "this person" if nearer == 0 else f"{nearer + 1}. guess"
                colour = "#0a7a2f" if nearer == 0 else "gray"
                pen.text((x + k * cell, y + cell + 1), f"{score:+.2f}  {told}", colour, font)
    return page


def run(output: Path, seed: int = 1) -> Path:
    """Draws the sheet; returns its file.

    Raises:
        ServerError: no ComfyUI, or a graph failed.
        FileNotFoundError: the small system is not there.
    """
    comfyui = installed_comfyui("demo")
    people, judge, rows, began = read_people(), Judge(), [], time.monotonic()
    with ComfyServer(comfyui, arguments=device_arguments()) as server:
        print(f"ComfyUI {version_of(comfyui)} with FeedFace after {time.monotonic() - began:.0f} s", flush=True)
        for person in people:
            names = [server.upload(path) for path in person.references]
            result = server.run(workflow(names, seed=seed), timeout=600)
            row: dict[str, Any] = {
                "references": [numpy.asarray(Image.open(p).convert("RGB")) for p in person.references]
            }
            for kind in ("plain", "face"):
                row[kind] = [server.pictures(result, f"{kind}{i}")[0] for i in range(len(PROMPTS))]
                row[f"{kind}_scores"] = judge.compare(row[kind], person.index)
            rows.append(row)
            told = [sum(nearer == 0 for _, nearer in row[f"{kind}_scores"]) for kind in ("plain", "face")]
            print(
                f"person {person.index}: named among {len(judge.gallery)} in {told[1]} of {len(PROMPTS)} pictures with "
                f"the face, {told[0]} without; {time.monotonic() - began:.0f} s",
                flush=True,
            )
    output.mkdir(parents=True, exist_ok=True)
    page = sheet(rows)
    page.save(output / "people.png")
    return output / "people.png"
