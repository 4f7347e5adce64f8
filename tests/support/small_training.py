"""Photos, models and settings for training runs that take a few seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from tools.tiny_diffusers import TinySize, make_base, make_encoder
from trainer.config import Config

ROOT = Path(__file__).resolve().parents[2]
SIZE = TinySize()


def make_photos(folder: Path, count: int = 12, people: int = 4) -> Path:
    """Pictures with a disc for a face, their masks, and a manifest; the manifest's path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        random = numpy.random.default_rng(index)
        colours = random.integers(0, 255, (12, 12, 3), dtype=numpy.uint8)
        photo = Image.fromarray(colours).resize((96, 80), Image.Resampling.BICUBIC)
        left, top, side = int(random.integers(10, 40)), int(random.integers(8, 30)), int(random.integers(20, 36))
        disc = (left, top, left + side, top + side)
        ImageDraw.Draw(photo).ellipse(disc, fill=tuple(int(value) for value in random.integers(0, 255, 3)))
        mask = Image.new("L", photo.size, 0)
        ImageDraw.Draw(mask).ellipse(disc, fill=231)
        photo.save(folder / f"{index}.png")
        mask.save(folder / f"{index}-mask.png")
        person = index % people
        rows.append(
            {
                "path": f"{index}.png",
                "caption": f"a photo of person {person}",
                "width": 96,
                "height": 80,
                "bbox": disc,
                "square_bbox": (left - 2, top - 2, left + side + 2, top + side + 2),
                "mask_path": f"{index}-mask.png",
                "identity": f"person {person}",
            }
        )
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return manifest


def make_models(folder: Path, family: str = "sd1", size: TinySize = SIZE) -> Path:
    """A small base in ``base`` and a small CLIP vision encoder in ``clip`` below the folder."""
    make_base(folder / "base", family, size)
    make_encoder(folder / "clip", image_size=64)
    return folder


def settings(models: Path, manifest: Path, output: Path, **changes) -> dict:
    """Settings of a run of six steps; ``changes`` are ``section__name=value``."""
    values: dict = {
        "model": {"base": str(models / "base"), "precision": "fp32"},
        "adapter": {"encoder": {"path": str(models / "clip"), "image_size": 64}},
        "data": {"manifest": str(manifest), "resolution": 64, "workers": 0, "references": 3},
        "optimiser": {"lr": 1e-3, "warmup_steps": 2},
        "train": {
            "output": str(output),
            "steps": 6,
            "batch_size": 4,
            "ema": 0.9,
            "checkpoint_every": 2,
            "keep": 3,
            "log_every": 2,
            "validate_every": None,
            "tracker": "none",
            "seed": 3,
        },
    }
    for name, value in changes.items():
        section, _, setting = name.partition("__")
        values.setdefault(section, {})[setting] = value
    return values


def make_config(models: Path, manifest: Path, output: Path, **changes) -> Config:
    """As :func:`settings`, checked."""
    return Config.load(**settings(models, manifest, output, **changes))


def run(arguments: Sequence[str], timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """A command line in a process of its own, with the project on its path and one thread."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        list(arguments), capture_output=True, text=True, cwd=ROOT, timeout=timeout, env={**os.environ, **own}
    )


def train_in_process_of_its_own(config: Config, code: str = "") -> subprocess.CompletedProcess:
    """Train; ``code`` runs first, to make things go wrong."""
    script = (
        f"{code}\nimport sys\nfrom trainer import train\nfrom trainer.config import Config\n"
        "train.parse = lambda _: Config.from_json(sys.argv[1])\nsys.exit(train.main())\n"
    )
    return run([sys.executable, "-c", script, config.to_json()])


def weights(output: Path, step: int, name: str = "trainables") -> dict[str, Tensor]:
    """Tensors of a checkpoint."""
    return load_file(output / f"checkpoint-{step:08d}" / f"{name}.safetensors")


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all tensors; 0 means bit-identical values."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether any weight changed."""
    return any(not torch.equal(before[name], after[name]) for name in before)
