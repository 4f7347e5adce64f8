"""The README of the published small system, from its files and its training logs."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from .people import ATTRIBUTES
from .text import vocabulary

LOGS = {
    "autoencoder": ("autoencoder", "autoencoder"),
    "unet": ("denoiser", "denoiser"),
    "encoder": ("encoder", "encoder"),
    "recogniser": ("examiner", "examiner"),
    "adapter": ("adapters/full", "log"),
}  # stage → folder and name of its log
TEXT = """# The small system

A complete text-to-image model with a FeedFace adapter, trained from nothing by this project on drawn people, to show
the method at work on a CPU. It draws 64 × 64 pixels; for pictures to keep, use a real model.

`python -m examples.small_model.build` makes every file here; nothing is downloaded but the package that draws. The
people come from [facesjs](https://github.com/zengm-games/facesjs) (Apache-2.0), which draws; who they are, how they
look in each picture and what the caption says is chosen from seeds in `examples/small_model/people.py`. No person of
the `people` folder, nor any other held-out one, was seen in training.

Captions name the scene and never the person, so the model alone cannot know who to draw; that is what the adapter adds.

In ComfyUI: *FeedFace Small Model* gives MODEL, CLIP and VAE; *FeedFace Load Adapter* lists `feedface_small`; the
picture size is 64 × 64. `workflows/feedface_small.json` is the graph. The folder is a diffusers folder too.

## Words

{words}.

{attributes}

## Files

| file | parameters | MB | |
| --- | ---: | ---: | --- |
{files}

## Training

Times are of one thread on two CPU cores, shared with whatever else ran there; `training` has the logs.

| stage | steps | minutes | at the end |
| --- | ---: | ---: | --- |
{stages}
"""
MEANING = {
    "unet": "text-to-image U-Net in Stable Diffusion's layout, predicts v",
    "vae": "KL autoencoder, 64 × 64 × 3 to 8 × 8 × 16",
    "text_encoder": "two-layer CLIP text transformer",
    "adapter/feedface_small.safetensors": "FeedFace adapter, with its face encoder (CLIP vision, 48 × 48)",
    "examiner/identity.safetensors": "judges who it is and reads attributes; never conditions anything",
    "examiner/masks.safetensors": "finds head and hair, to measure what is around them",
    "examiner/gallery.safetensors": "what the examiner knows of the held-out people",
}


def write_readme(work: Path, output: Path) -> Path:
    """Writes ``output/README.md``."""
    attributes = [f"- {name.replace('_', ' ')}: {', '.join(values)}" for name, values in ATTRIBUTES.items()]
    text = TEXT.format(
        words=", ".join(f"`{word}`" for word in vocabulary()),
        attributes="\n".join(attributes),
        files="\n".join(_files(output)),
        stages="\n".join(_stages(work)),
    )
    path = output / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _files(output: Path) -> list[str]:
    lines, total = [], 0
    for path in sorted(output.rglob("*.safetensors")):
        name = str(path.relative_to(output))
        part = name.split("/")[0]
        if part == "face_encoder":
            continue
        with safe_open(path, "pt") as file:
            count = 0
            for key in file.keys():  # noqa: SIM118 — not a dict
                size = 1
                for side in file.get_slice(key).get_shape():
                    size *= side
                count += size
        total += path.stat().st_size
        meaning = MEANING.get(name, MEANING.get(part, ""))
        lines.append(f"| `{name}` | {count / 1e6:.2f} M | {path.stat().st_size / 1e6:.2f} | {meaning} |")
    return [*lines, f"| all | | {total / 1e6:.2f} | |"]


def _stages(work: Path) -> list[str]:
    seconds: dict[str, float] = {}
    if (work / "stages.jsonl").is_file():
        for line in (work / "stages.jsonl").read_text().splitlines():
            record = json.loads(line)
            seconds[record["stage"]] = seconds.get(record["stage"], 0) + record["seconds"]
    lines = []
    for stage, spent in seconds.items():
        if stage in ("text", "publish", "variants"):  # moments, and what is not published
            continue
        steps, end = "", ""
        if stage in LOGS:
            folder, name = LOGS[stage]
            last = json.loads((work / folder / f"{name}.jsonl").read_text().splitlines()[-1])
            steps = last.pop("step")
            told = {key: value for key, value in last.items() if key not in ("seconds", "learning rate")}
            end = ", ".join(f"{key} {value:.4g}" for key, value in told.items() if "timestep" not in key)
        lines.append(f"| {stage} | {steps} | {spent / 60:.1f} | {end} |")
    return lines
