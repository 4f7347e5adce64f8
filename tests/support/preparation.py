"""Photos to prepare, and what becomes of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from feedface_core.faces import DetectedFace
from trainer import prepare
from trainer.config import PrepareSettings
from trainer.preparation.photo import Photo

BOX = [50, 30, 110, 90]


def make_photo(path: Path, seed: int = 0, size: tuple[int, int] = (160, 120), blur: float = 0.0) -> Path:
    """A picture with fine structure and an outlined disc at (50, 30) … (110, 90)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    photo = Image.fromarray(values).resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(photo)
    draw.ellipse((50, 30, 110, 90), outline="white", width=3)
    photo.filter(ImageFilter.GaussianBlur(blur)).save(path)
    return path


def write_table(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def run(photos, output, *settings: str) -> dict:
    return prepare.prepare(PrepareSettings.load(None, settings, photos=str(photos), output=str(output)), False)


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]


def dropped_of(output: Path) -> dict[str, str]:
    lines = (output / "dropped.jsonl").read_text().splitlines()
    return {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}


def make_staged(size=(160, 120), box=BOX, seed=0) -> Photo:
    """A photo whose face was found."""
    values = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    photo = Photo("a", Path("a"), picture=Image.fromarray(values).resize(size, Image.Resampling.NEAREST))
    photo.row = {"width": size[0], "height": size[1]}
    photo.face = DetectedFace(tuple(box))
    return photo


class DiesOnce:
    """Stages of which the process is killed when it first sees the photo ``3``; they leave a file for each batch."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, batch):
        number = len(list(self.folder.glob(f"{batch[0].id}-*")))
        (self.folder / f"{batch[0].id}-{number}").touch()
        if batch[0].id == "3" and number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        for photo in batch:
            photo.row["seen"] = True
        return batch
