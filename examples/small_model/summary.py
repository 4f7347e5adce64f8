"""The README of the published small model, from its files and its training logs."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from feedface_core.files.adapter_file import load_adapter

from .people import ATTRIBUTES
from .system import ADAPTER, picture_size
from .text import vocabulary

LOGS = {
    "autoencoder": "autoencoder",
    "unet": "unet",
    "encoder": "encoder",
    "mask_reader": "masks",
    "eye_reader": "eyes",
    "recogniser": "recogniser",
    "adapter": "adapters/full",
}  # stage → folder of its log
MEANING = {
    "unet": "text-to-image U-Net in Stable Diffusion's layout, predicts v",
    "vae": "KL autoencoder, {size} × {size} × 3 to {cells} × {cells} × 16",
    "text_encoder": "two-layer CLIP text transformer",
    "adapter/feedface_small.safetensors": "FeedFace adapter, with its face encoder (CLIP vision, {crop} × {crop})",
    "adapter/feedface_small_face0.safetensors": "the same in the text's tokens (Face0)",
    "adapter/feedface_small_mixer.safetensors": "face and background in the text's tokens (Face Mixer)",
    "adapter/feedface_small_several.safetensors": "has seen two people in one picture",
    "examiner/identity.safetensors": "judges who it is, reads attributes and features; never conditions anything",
    "examiner/masks.safetensors": "finds head and hair, to measure what is around them",
    "examiner/eyes.safetensors": "finds sound eyes",
    "examiner/gallery.safetensors": "what the examiner knows of the held-out people",
}


def write_readme(work: Path, output: Path) -> Path:
    """Writes ``output/README.md``."""
    size, crop = picture_size(output), load_adapter(output / ADAPTER).config.encoder.image_size
    sizes = {"size": size, "cells": size // 8, "crop": crop}
    attributes = [f"- {name.replace('_', ' ')}: {', '.join(values)}" for name, values in ATTRIBUTES.items()]
    template = Path(__file__).with_name("README.template.md").read_text(encoding="utf-8")
    text = template.format(
        words=", ".join(f"`{word}`" for word in vocabulary()),
        attributes="\n".join(attributes),
        files="\n".join(_files(output, sizes)),
        stages="\n".join(_stages(work)),
        size=size,
    )
    path = output / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _files(output: Path, sizes: dict[str, int]) -> list[str]:
    lines, total = [], 0.0
    for path in sorted(output.rglob("*.safetensors")):
        name, folder = path.relative_to(output).as_posix(), path.relative_to(output).parts[0]
        if folder == "face_encoder":  # the adapter carries it
            continue
        count, size = sum(tensor.numel() for tensor in load_file(path).values()) / 1e6, path.stat().st_size / 1e6
        meaning = (MEANING.get(name) or MEANING.get(folder, "")).format(**sizes)
        lines.append(f"| `{name}` | {count:.2f} M | {size:.2f} | {meaning} |")
        total += size
    return [*lines, f"| all | | {total:.2f} | |"]


def _stages(work: Path) -> list[str]:
    """A line for each stage: steps, minutes over all its runs, and the last line of its log."""
    seconds: dict[str, float] = {}
    for record in map(json.loads, (work / "stages.jsonl").read_text().splitlines()):
        seconds[record["stage"]] = seconds.get(record["stage"], 0) + record["seconds"]
    lines = [f"| people | | {seconds['people'] / 60:.1f} | |"] if "people" in seconds else []
    for stage, folder in LOGS.items():
        if stage in seconds:
            last = json.loads((work / folder / "log.jsonl").read_text().splitlines()[-1])
            steps, skipped = last.pop("step"), ("timestep", "learning rate", "second")
            end = [f"{key} {value:.4g}" for key, value in last.items() if not any(word in key for word in skipped)]
            lines.append(f"| {stage} | {steps} | {seconds[stage] / 60:.1f} | {', '.join(end)} |")
    return lines
