"""The networks that only judge: the examiner tells who is shown and reads what a caption names and a person is told
by, the mask reader finds heads, the eye reader sound eyes.

They share nothing with the face encoder: convolutions on whole pictures, other people, other seeds. They never
condition anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from .drawing import People
from .identity import CosineHead, classify, degrade, recolor, visible
from .people import ATTRIBUTES
from .settings import Stage
from .training import train

EMBEDDING = 128
CELLS = 32  # of the eye reader, a side
EYE = 32.0  # units of the drawing from the middle of an eye to its border, about
Values = Mapping[str, Sequence[str]]


class Reading(NamedTuple):
    """What the examiner makes of pictures.

    Attributes:
        identity: ``(N, 128)`` embedding of who it is.
        attributes: ``(N, values)`` logits for each of ``ATTRIBUTES``.
        features: ``(N, values)`` logits for each of ``FEATURES`` that the examiner reads.
        pooled: ``(N, 64)`` means over the last grid, for Fréchet distances.
    """

    identity: Tensor
    attributes: dict[str, Tensor]
    features: dict[str, Tensor]
    pooled: Tensor


class Examiner(nn.Module):
    """Pictures ``(N, 3, S, S)`` in −1…1 → :class:`Reading`.

    Args:
        values: of each of ``FEATURES``, such as the names of all noses; empty for an examiner that reads none.
        size: side of the pictures, a multiple of 64.
    """

    def __init__(self, values: Values, size: int = 64, widths: tuple[int, ...] = (32, 64, 96, 128)):
        super().__init__()
        torch.manual_seed(102)
        self.values = values
        stride = size // 32
        self.stem = nn.Conv2d(3, widths[0], 2 * stride + 1, stride, stride)  # (N, 32, 32, 32)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.stages = nn.Sequential(*(_Residual(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)))
        self.norm = nn.GroupNorm(8, widths[-1])
        self.narrow = nn.Conv2d(widths[-1], 64, 1)
        # what is where matters for everything, so the last grid is kept
        self.identity = nn.Linear(64 * 16, EMBEDDING)
        self.attributes = nn.ModuleDict({a: nn.Linear(64 * 16, len(v)) for a, v in ATTRIBUTES.items()})
        self.features = nn.ModuleDict({f: nn.Linear(64 * 16, len(v)) for f, v in values.items()})

    def forward(self, x: Tensor) -> Reading:
        h = F.silu(self.norm(self.stages(self.stem(x))))  # (N, 128, 4, 4)
        grid = self.narrow(h)  # (N, 64, 4, 4)
        h = grid.flatten(1)
        attributes, features = ({n: head(h) for n, head in m.items()} for m in (self.attributes, self.features))
        return Reading(self.identity(h), attributes, features, grid.mean((2, 3)))


class EyeReader(nn.Module):
    """Pictures ``(N, 3, S, S)`` in −1…1 → logits ``(N, 1, 32, 32)`` of sound eyes. It sees little beside an eye."""

    def __init__(self, size: int = 64, width: int = 32):
        super().__init__()
        torch.manual_seed(104)
        stride = size // CELLS
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3 * stride + 1, stride, 3 * stride // 2),
            _Residual(width, 2 * width, 1),
            _Residual(2 * width, 2 * width, 1),
        )
        self.head = nn.Sequential(nn.GroupNorm(8, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def two_eyes(logits: np.ndarray, tilt: float = 12.0) -> np.ndarray:
    """Which pictures have exactly two eyes of similar size on a level, from the eye reader's ``(N, 32, 32)`` logits.

    Similar: the smaller covers at least half the cells of the larger. Level: the line through both is at most ``tilt``
    degrees from the horizontal; the drawings are turned by up to 6.
    """
    sound = np.zeros(len(logits), bool)
    for i, picture in enumerate(logits):
        spots, count = ndimage.label(picture > 0)
        if count == 2:
            cells = ndimage.sum_labels(np.ones_like(picture), spots, [1, 2])
            (y0, x0), (y1, x1) = ndimage.center_of_mass(spots > 0, spots, [1, 2])
            level = abs(y1 - y0) <= np.tan(np.radians(tilt)) * abs(x1 - x0)
            sound[i] = level and cells.min() >= 0.5 * cells.max()
    return sound


class MaskReader(nn.Module):
    """Pictures ``(N, 3, S, S)`` in −1…1 → logits ``(N, 1, 32, 32)`` of head and hair, for measuring what is around."""

    def __init__(self, size: int = 64, width: int = 16):
        super().__init__()
        torch.manual_seed(103)
        stride = size // 32
        self.fine = nn.Conv2d(3, width, 2 * stride + 1, stride, stride)  # (N, 16, 32, 32)
        self.down = nn.Sequential(_Residual(width, 2 * width, 2), _Residual(2 * width, 4 * width, 2))
        self.deep = nn.Sequential(_Residual(4 * width, 4 * width, 1), _Residual(4 * width, 4 * width, 1))
        self.up = nn.Conv2d(4 * width, width, 1)
        self.head = nn.Sequential(_Residual(2 * width, width, 1), nn.SiLU(), nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = self.up(self.deep(self.down(fine)))  # (N, 16, 8, 8)
        coarse = F.interpolate(coarse, scale_factor=4, mode="bilinear")
        return self.head(torch.cat([fine, coarse], 1))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, inputs),
            nn.SiLU(),
            nn.Conv2d(inputs, outputs, 3, stride, 1),
            nn.GroupNorm(8, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.skip(x)


class _ExaminerWithHead(nn.Module):
    def __init__(self, values: Values, identities: int, size: int):
        super().__init__()
        self.examiner = Examiner(values, size)
        self.head = CosineHead(EMBEDDING, identities)


def train_examiner(people: People, folder: Path, stage: Stage) -> Examiner:
    """Trains the examiner on whole pictures: who it is, every attribute and every feature.

    Heads and hair of every second picture have another colour than the drawing gave them, so that identity cannot be
    colour alone; those pictures teach nothing about the colours of skin and hair.
    """
    names, labels = torch.from_numpy(people.identities()), people.labels()
    values, shown = people.features()
    model = _ExaminerWithHead(values, int(names.max()) + 1, people.size)
    pad, batch = people.size // 16, stage.batch_size

    def losses(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = rng.integers(len(people), size=batch)
        recolored = torch.from_numpy(rng.random(batch) < 0.5)
        x = recolor(people.pixels(index), people.masks(index) * recolored[:, None, None, None], rng)
        dx, dy = rng.integers(-pad, pad + 1, 2)
        x = torch.roll(F.pad(x, (pad,) * 4, mode="replicate"), (int(dx), int(dy)), (3, 2))[..., pad:-pad, pad:-pad]
        reading = model.examiner(degrade(x, rng))
        identity, right = model.head(reading.identity, names[index])
        attributes, read = classify(reading.attributes, {a: labels[a][index] for a in ATTRIBUTES})
        features, told = classify(reading.features, visible(shown, index, recolored))
        values = {"identity": identity, "right": right, "attributes": attributes, "attributes read": read}
        return {"loss": identity + attributes + features, **values, "features": features, "features read": told}

    return train(folder, model, stage, losses).examiner


def train_eye_reader(people: People, folder: Path, stage: Stage) -> EyeReader:
    """Trains the eye reader on people without glasses. Eyes of every second picture are spoilt: those are no eyes."""
    bare = np.array([i for i, record in enumerate(people.records) if record["glasses"] == "none"])
    model, size = EyeReader(people.size), people.size

    def losses(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = rng.choice(bare, stage.batch_size)
        x, target = people.pixels(index), torch.zeros(stage.batch_size, 1, CELLS, CELLS)
        for row, i in enumerate(index):
            record = people.records[i]
            spoilt = rng.random() < 0.5
            for x0, y0 in record["eyes"]:
                radius = EYE * record["unit"]
                if spoilt and rng.random() < 0.6:
                    spoil(x[row], (x0, y0), radius, rng)
                else:
                    target[row, 0] += _disc((x0, y0), radius, size)
        logits = model(degrade(x, rng)).float()
        return {"loss": F.binary_cross_entropy_with_logits(logits, target.clamp(max=1), pos_weight=torch.tensor(4.0))}

    return train(folder, model, stage, losses)


def _disc(middle: tuple[float, float], radius: float, size: int) -> Tensor:
    """Cells ``(32, 32)`` whose middles are within ``radius`` pixels of a place."""
    places = (torch.arange(CELLS) + 0.5) * size / CELLS
    apart = (places[None, :] - middle[0]) ** 2 + (places[:, None] - middle[1]) ** 2
    return (apart < radius**2).float()


def spoil(picture: Tensor, middle: tuple[float, float], radius: float, rng: np.random.Generator) -> None:
    """Smears, blurs, wipes away or bends what is within ``radius`` pixels of a place in ``(3, S, S)``, as generated
    pictures do with eyes. In place."""
    size, half = picture.shape[-1], int(np.ceil(1.3 * radius))
    x, y = (int(np.clip(round(v), half, size - half)) for v in middle)
    window = picture[:, y - half : y + half, x - half : x + half]
    way, side = rng.integers(4), 2 * half
    if way == 0:  # smeared along a direction
        along = int(rng.integers(2)) + 1
        wide = int(side * rng.uniform(0.5, 1)) | 1
        kernel = (wide, 1) if along == 1 else (1, wide)
        other = F.avg_pool2d(window[None], kernel, 1, (kernel[0] // 2, kernel[1] // 2), count_include_pad=False)[0]
    elif way == 1:  # blurred
        wide = max(3, int(side * rng.uniform(0.3, 0.6))) | 1
        other = F.avg_pool2d(window[None], wide, 1, wide // 2, count_include_pad=False)[0]
    elif way == 2:  # the skin around it
        other = window.flatten(1).median(1).values[:, None, None].expand_as(window)
    else:  # bent
        coarse = torch.from_numpy(rng.uniform(-0.7, 0.7, (1, 2, 4, 4))).float()
        bend = F.interpolate(coarse, size=(side, side), mode="bilinear").movedim(1, -1)
        grid = F.affine_grid(torch.eye(2, 3)[None], [1, 3, side, side], align_corners=False) + bend
        other = F.grid_sample(window[None], grid, padding_mode="border", align_corners=False)[0]
    window.copy_(window + (other - window) * _round_window(side))


def _round_window(side: int) -> Tensor:
    """``(side, side)``: 1 in the middle, 0 at the border, with a soft edge."""
    places = (torch.arange(side) + 0.5) / side * 2 - 1
    return ((1 - (places[None, :] ** 2 + places[:, None] ** 2).sqrt()) * 4).clamp(0, 1)


def train_mask_reader(people: People, folder: Path, stage: Stage) -> MaskReader:
    """Trains the mask reader on pictures and their drawn masks."""
    model, stride = MaskReader(people.size), people.size // 32

    def losses(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = rng.integers(len(people), size=stage.batch_size)
        target = F.avg_pool2d(people.masks(index), stride)
        logits = model(degrade(people.pixels(index), rng)).float()
        wrong = ((logits > 0) != (target > 0.5)).float().mean()
        return {"loss": F.binary_cross_entropy_with_logits(logits, target), "wrong": wrong}

    return train(folder, model, stage, losses)
