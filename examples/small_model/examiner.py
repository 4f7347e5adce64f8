"""The networks that only judge: the examiner tells who is shown and reads what a caption names, the mask reader finds
heads.

They share nothing with the face encoder: convolutions on whole pictures, from other seeds. They never condition
anything.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .drawing import People
from .identity import CosineHead, degrade
from .people import ATTRIBUTES
from .settings import Stage
from .training import train

EMBEDDING = 128


class Examiner(nn.Module):
    """Pictures ``(N, 3, S, S)`` in −1…1 → an identity embedding ``(N, 128)`` and logits for each attribute."""

    def __init__(self, size: int = 64, widths: tuple[int, ...] = (32, 64, 96, 128)):
        super().__init__()
        torch.manual_seed(102)
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)  # (N, 32, S/2, S/2)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.stages = nn.Sequential(*(_Residual(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)))
        self.norm = nn.GroupNorm(8, widths[-1])
        self.narrow = nn.Conv2d(widths[-1], 64, 1)
        # who: what is where matters, so the last grid is kept; attributes: the same
        features = 64 * (size // 16) ** 2
        self.identity = nn.Linear(features, EMBEDDING)
        self.attributes = nn.ModuleDict({a: nn.Linear(features, len(v)) for a, v in ATTRIBUTES.items()})

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = F.silu(self.norm(self.stages(self.stem(x))))  # (N, 128, S/16, S/16)
        h = self.narrow(h).flatten(1)  # (N, features)
        return self.identity(h), {a: head(h) for a, head in self.attributes.items()}


class MaskReader(nn.Module):
    """Pictures ``(N, 3, S, S)`` in −1…1 → logits ``(N, 1, S/2, S/2)`` of head and hair, for measuring what is
    around."""

    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(103)
        self.fine = nn.Conv2d(3, width, 5, 2, 2)  # (N, 16, S/2, S/2)
        self.down = nn.Sequential(_Residual(width, 2 * width, 2), _Residual(2 * width, 4 * width, 2))
        self.deep = nn.Sequential(_Residual(4 * width, 4 * width, 1), _Residual(4 * width, 4 * width, 1))
        self.up = nn.Conv2d(4 * width, width, 1)
        self.head = nn.Sequential(_Residual(2 * width, width, 1), nn.SiLU(), nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = self.up(self.deep(self.down(fine)))  # (N, 16, S/8, S/8)
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
    def __init__(self, identities: int, size: int):
        super().__init__()
        self.examiner = Examiner(size)
        self.head = CosineHead(EMBEDDING, identities)


def train_examiner(people: People, folder: Path, stage: Stage) -> Examiner:
    """Trains the examiner on whole pictures: who it is, and every attribute."""
    names, labels = torch.from_numpy(people.identities()), people.labels()
    model = _ExaminerWithHead(int(names.max()) + 1, people.size)

    def losses(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = rng.integers(len(people), size=stage.batch_size)
        x = people.pixels(index)
        dx, dy = rng.integers(-4, 5, 2)
        x = torch.roll(F.pad(x, (4, 4, 4, 4), mode="replicate"), (int(dx), int(dy)), (3, 2))[..., 4:-4, 4:-4]
        embedding, logits = model.examiner(degrade(x, rng))
        identity, right = model.head(embedding, names[index])
        targets = {a: torch.from_numpy(labels[a][index]) for a in ATTRIBUTES}
        attributes = torch.stack([F.cross_entropy(logits[a].float(), targets[a]) for a in ATTRIBUTES]).mean()
        read = torch.stack([(logits[a].argmax(1) == targets[a]).float().mean() for a in ATTRIBUTES]).mean()
        loss = identity + attributes
        return {"loss": loss, "identity": identity, "right": right, "attributes": attributes, "attributes read": read}

    return train(folder, model, stage, losses).examiner


def train_mask_reader(people: People, folder: Path, stage: Stage) -> MaskReader:
    """Trains the mask reader on pictures and their drawn masks."""
    model = MaskReader()

    def losses(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = rng.integers(len(people), size=stage.batch_size)
        target = F.avg_pool2d(people.masks(index), 2)
        logits = model(degrade(people.pixels(index), rng)).float()
        wrong = ((logits > 0) != (target > 0.5)).float().mean()
        return {"loss": F.binary_cross_entropy_with_logits(logits, target), "wrong": wrong}

    return train(folder, model, stage, losses)
