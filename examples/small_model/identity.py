"""The two networks that know people: the face encoder that conditions, and the examiner that only judges.

They share nothing: the encoder is a CLIP vision transformer on face crops; the examiner is a convolutional network on
whole pictures, from another seed, that also reads the attributes a caption names. The examiner is never used for
conditioning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from feedface_core.faces.crop import CROP_SCALE

from .drawing import People
from .loop import LoopConfig, pixels, train
from .people import ATTRIBUTES, detector_box

CROP = 48  # pixels of a face crop's side
ENCODER_LOOP = LoopConfig(steps=4500, batch=64, rate=1.5e-3, weight_decay=0.05, average=0.995)
MASK_LOOP = LoopConfig(steps=600, batch=32, rate=2e-3, seed=103)
EXAMINER_LOOP = LoopConfig(steps=4000, batch=48, rate=2e-3, weight_decay=0.05, average=0.995, seed=101)


class CosineHead(nn.Module):
    """Classification of identities by cosine with a margin, ``s·(cos θ − m·[own class])`` (CosFace, Wang et al. 2018,
    eq. 4)."""

    def __init__(self, width: int, classes: int, scale: float = 20.0, margin: float = 0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width) * width**-0.5)
        self.scale, self.margin = scale, margin

    def forward(self, embedding: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings ``(B, D)`` and classes ``(B,)`` → the loss and the share told right."""
        cosine = F.normalize(embedding.float(), dim=-1) @ F.normalize(self.weight, dim=-1).T  # (B, classes)
        right = (cosine.argmax(1) == target).float().mean()
        logits = self.scale * (cosine - self.margin * F.one_hot(target, cosine.shape[1]))
        return F.cross_entropy(logits, target), right


def crops(pictures: Tensor, boxes: Tensor, size: int = CROP) -> Tensor:
    """Square crops ``(N, 3, size, size)`` of 1.1 × the longer side of ``boxes`` ``(N, 4)``; grey (0) past the
    border."""
    x0, y0, x1, y1 = boxes.unbind(1)
    half = torch.maximum(x1 - x0, y1 - y0) * CROP_SCALE / 2
    side = pictures.shape[-1]
    step = (torch.arange(size) + 0.5) / size * 2 - 1
    xs = ((x0 + x1) / 2)[:, None] + half[:, None] * step  # (N, size) in pixels
    ys = ((y0 + y1) / 2)[:, None] + half[:, None] * step
    grid = torch.stack([xs[:, None, :].expand(-1, size, -1), ys[:, :, None].expand(-1, -1, size)], -1) / side * 2 - 1
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def degrade(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, blur and noise of pictures in -1…1, so that judgement does not hang on crisp lines."""
    count = len(x)

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, 1, 1, 1))).float()

    x = x * draw(0.85, 1.1) + draw(-0.08, 0.08)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blend = draw(-0.5, 1).clamp(0, 1)
    x = x + (soft - x) * blend
    return x + torch.randn_like(x) * draw(0, 0.08)


# --------------------------------------------------------------------------- face encoder


def create_encoder() -> CLIPVisionModel:
    """An untrained CLIP vision transformer: 48 × 48 pixels, patches of 8, 37 tokens of width 160."""
    torch.manual_seed(2)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=160,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=CROP,
            patch_size=8,
            projection_dim=160,
            hidden_act="gelu",
        )
    )


class _EncoderWithHead(nn.Module):
    """The penultimate tokens are what conditions, so they are trained too: their mean and the class token both
    identify."""

    def __init__(self, identities: int):
        super().__init__()
        self.encoder = create_encoder()
        self.encoder.set_attn_implementation("eager")  # faster to train than fused attention on a CPU
        width = self.encoder.config.hidden_size
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.head = CosineHead(width, identities)
        self.inner_head = CosineHead(width, identities)

    def embeddings(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.encoder(pixel_values=x, output_hidden_states=True)
        return out.pooler_output, self.inner(out.hidden_states[-2].mean(1))


def train_encoder(people: People, folder: Path, loop: LoopConfig = ENCODER_LOOP, log=print) -> CLIPVisionModel:
    """Trains the face encoder to tell the people of ``people`` apart on jittered face crops."""
    names = people.identities()
    # half of the crops are of the whole head, half of what a detector would find
    boxes = np.array([[r["box"], detector_box(r["box"])] for r in people.records], np.float32)  # (N, 2, 4)
    model = _EncoderWithHead(int(names.max()) + 1)

    def loss_of(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = np.sort(rng.integers(len(names), size=loop.batch))
        box = boxes[index, rng.integers(2, size=loop.batch)]
        side = (box[:, 3] - box[:, 1])[:, None]
        # a detector's box differs from ours by place and size
        box = box + np.tile(rng.uniform(-0.06, 0.06, (loop.batch, 2)) * side, 2)
        box = box + np.array([-1, -1, 1, 1]) * rng.uniform(-0.08, 0.05, (loop.batch, 1)) * side
        x = crops(pixels(people.pictures[index]), torch.from_numpy(box).float())
        with torch.autocast("cpu", torch.bfloat16):
            outer, inner = model.embeddings(degrade(x, rng))
        target = torch.from_numpy(names[index])
        loss, right = model.head(outer, target)
        inner_loss, _ = model.inner_head(inner, target)
        return {"loss": loss + inner_loss, "outer": loss, "inner": inner_loss, "right": right}

    return train("encoder", folder, model, loop, loss_of, log).encoder


# --------------------------------------------------------------------------- examiner


class Examiner(nn.Module):
    """Pictures ``(N, 3, 64, 64)`` in -1…1 → an identity embedding ``(N, 128)`` and logits for each attribute."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128), embedding: int = 128):
        super().__init__()
        torch.manual_seed(102)
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)  # (N, 32, 32, 32)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.stages = nn.Sequential(*(_Residual(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)))
        last = widths[-1]
        self.norm = nn.GroupNorm(8, last)
        self.narrow = nn.Conv2d(last, 64, 1)
        # who: what is where matters, so the last grid is kept; attributes: the same
        self.identity = nn.Linear(64 * 16, embedding)
        self.attributes = nn.ModuleDict({a: nn.Linear(64 * 16, len(v)) for a, v in ATTRIBUTES.items()})

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = F.silu(self.norm(self.stages(self.stem(x))))  # (N, 128, 4, 4)
        h = self.narrow(h).flatten(1)  # (N, 1024)
        return self.identity(h), {a: head(h) for a, head in self.attributes.items()}


class MaskReader(nn.Module):
    """Pictures ``(N, 3, 64, 64)`` in -1…1 → logits ``(N, 1, 32, 32)`` of head and hair, for measuring what is
    around."""

    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(103)
        self.fine = nn.Conv2d(3, width, 5, 2, 2)  # (N, 16, 32, 32)
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
    def __init__(self, identities: int):
        super().__init__()
        self.examiner = Examiner()
        self.head = CosineHead(128, identities)


def train_examiner(people: People, folder: Path, loop: LoopConfig = EXAMINER_LOOP, log=print) -> Examiner:
    """Trains the examiner on whole pictures: who it is, and every attribute."""
    names = people.identities()
    labels = people.labels()
    model = _ExaminerWithHead(int(names.max()) + 1)

    def loss_of(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = np.sort(rng.integers(len(names), size=loop.batch))
        x = pixels(people.pictures[index])
        dx, dy = rng.integers(-4, 5, 2)
        x = torch.roll(F.pad(x, (4, 4, 4, 4), mode="replicate"), (int(dx), int(dy)), (3, 2))[..., 4:-4, 4:-4]
        with torch.autocast("cpu", torch.bfloat16):
            embedding, logits = model.examiner(degrade(x, rng))
        loss, right = model.head(embedding, torch.from_numpy(names[index]))
        terms = [F.cross_entropy(logits[a].float(), torch.from_numpy(labels[a][index])) for a in ATTRIBUTES]
        told = torch.stack(
            [(logits[a].argmax(1) == torch.from_numpy(labels[a][index])).float().mean() for a in ATTRIBUTES]
        )
        attributes = torch.stack(terms).mean()
        return {
            "loss": loss + attributes,
            "identity": loss,
            "right": right,
            "attributes": attributes,
            "told": told.mean(),
        }

    return train("examiner", folder, model, loop, loss_of, log).examiner


def train_mask_reader(people: People, folder: Path, loop: LoopConfig = MASK_LOOP, log=print) -> MaskReader:
    """Trains the mask reader on pictures and their drawn masks."""
    model = MaskReader()

    def loss_of(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = np.sort(rng.integers(len(people.records), size=loop.batch))
        target = F.avg_pool2d(torch.from_numpy(np.array(people.masks[index])).float()[:, None] / 255, 2)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(degrade(pixels(people.pictures[index]), rng)).float()
        wrong = ((logits > 0) != (target > 0.5)).float().mean()
        return {"loss": F.binary_cross_entropy_with_logits(logits, target), "wrong": wrong}

    return train("mask_reader", folder, model, loop, loss_of, log)
