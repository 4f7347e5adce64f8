"""The face encoder that conditions: a CLIP vision transformer on face crops, trained to tell people apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from feedface_core.faces.crop import CROP_SCALE

from .drawing import People
from .people import detector_box
from .settings import EncoderStage
from .training import train


class CosineHead(nn.Module):
    """Classification of identities by cosine with a margin, ``s·(cos θ − m·[own class])`` (CosFace, Wang et al. 2018,
    eq. 4)."""

    def __init__(self, width: int, classes: int, scale: float = 20.0, margin: float = 0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width) * width**-0.5)
        self.scale, self.margin = scale, margin

    @torch.autocast("cpu", enabled=False)
    def forward(self, embedding: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings ``(B, D)`` and classes ``(B,)`` → the loss and the share told right."""
        cosine = F.normalize(embedding.float(), dim=-1) @ F.normalize(self.weight, dim=-1).T  # (B, classes)
        right = (cosine.argmax(1) == target).float().mean()
        logits = self.scale * (cosine - self.margin * F.one_hot(target, cosine.shape[1]))
        return F.cross_entropy(logits, target), right


def crops(pictures: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Square crops ``(N, 3, size, size)`` of 1.1 × the longer side of ``boxes`` ``(N, 4)``; grey (0) past the
    border."""
    x0, y0, x1, y1 = (boxes / pictures.shape[-1]).unbind(1)
    half = torch.maximum(x1 - x0, y1 - y0) * CROP_SCALE
    zero = torch.zeros_like(half)
    theta = torch.stack([half, zero, x0 + x1 - 1, zero, half, y0 + y1 - 1], -1).unflatten(1, (2, 3))
    grid = F.affine_grid(theta, [len(boxes), 3, size, size], align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def degrade(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, blur and noise of pictures in −1…1, so that judgement does not hang on crisp lines."""

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (len(x), 1, 1, 1))).float()

    x = x * draw(0.85, 1.1) + draw(-0.08, 0.08)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + (soft - x) * draw(-0.5, 1).clamp(0, 1)
    return x + torch.randn_like(x) * draw(0, 0.08)


def recolor(pictures: Tensor, masks: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures ``(N, 3, S, S)`` in −1…1, each with another brightness and tint within its mask ``(N, 1, S, S)``."""
    factor = torch.from_numpy(rng.uniform(0.75, 1.25, (len(pictures), 3, 1, 1))).float()
    shift = torch.from_numpy(rng.uniform(-0.15, 0.15, (len(pictures), 1, 1, 1))).float()
    other = (((pictures + 1) * factor - 1) + shift).clamp(-1, 1)
    return pictures + (other - pictures) * masks


def visible(shown: Mapping[str, np.ndarray], index: np.ndarray, recolored: Tensor) -> dict[str, np.ndarray]:
    """Numbers of the features of the pictures ``index`` ``(N,)``: −100 for colours of the ``recolored`` ``(N,)``."""
    return {
        name: np.where(recolored & ("color" in name or name == "skin"), -100, numbers[index])
        for name, numbers in shown.items()
    }


def classify(logits: Mapping[str, Tensor], targets: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Means over names of the cross-entropy of logits ``(N, values)`` and of the share read right.

    Targets ``(N,)`` of −100 do not count."""
    losses, read = [], []
    for name, target in targets.items():
        wanted = torch.as_tensor(target)
        counted = wanted >= 0
        losses.append(F.cross_entropy(logits[name].float(), wanted, reduction="sum") / counted.sum().clamp(min=1))
        read.append(((logits[name].argmax(1) == wanted) & counted).sum() / counted.sum().clamp(min=1))
    return torch.stack(losses).mean(), torch.stack(read).mean()


def create_encoder(size: int = 48, patch: int = 8) -> CLIPVisionModel:
    """An untrained CLIP vision transformer: ``1 + (size / patch)²`` tokens of width 160."""
    torch.manual_seed(2)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=160,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=size,
            patch_size=patch,
            projection_dim=160,
            hidden_act="gelu",
        )
    )


class _EncoderWithHead(nn.Module):
    """The penultimate tokens are what conditions, so they are trained too: their mean and the class token both
    identify, and their mean tells each feature of the person."""

    def __init__(self, identities: int, size: int, patch: int, values: Mapping[str, list[str]]):
        super().__init__()
        self.encoder = create_encoder(size, patch)
        self.encoder.set_attn_implementation("eager")  # faster to train than fused attention on a CPU
        width = self.encoder.config.hidden_size
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.head = CosineHead(width, identities)
        self.inner_head = CosineHead(width, identities)
        self.features = nn.ModuleDict({name: nn.Linear(width, len(those)) for name, those in values.items()})

    def embeddings(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.encoder(pixel_values=x, output_hidden_states=True)
        return out.pooler_output, self.inner(out.hidden_states[-2].mean(1))


def train_encoder(
    people: People, folder: Path, stage: EncoderStage, size: int, start: Mapping[str, Tensor] | None = None
) -> CLIPVisionModel:
    """Trains the face encoder to tell the people of ``people`` apart on jittered face crops of ``size`` pixels, from
    the weights to ``start`` with or from nothing.

    A share of the crops is recoloured, so that colour is not all that tells people apart; where the stage gives
    features a weight, their kinds (hair, nose, …) are told as well.
    """
    names, batch = people.identities(), stage.batch_size
    values, shown = people.features() if stage.feature_weight else ({}, {})
    # half of the crops are of the whole head, half of what a detector would find
    boxes = np.array([[r["box"], detector_box(r["box"])] for r in people.records], np.float32)  # (N, 2, 4)
    model = _EncoderWithHead(int(names.max()) + 1, size, stage.patch, values)
    if start is not None:
        model.encoder.load_state_dict(start)

    def losses(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = rng.integers(len(people), size=batch)
        box = boxes[index, rng.integers(2, size=batch)]
        side = (box[:, 3] - box[:, 1])[:, None]
        # a detector's box differs from ours by place and size
        box = box + np.tile(rng.uniform(-0.06, 0.06, (batch, 2)) * side, 2)
        box = box + np.array([-1, -1, 1, 1]) * rng.uniform(-0.08, 0.05, (batch, 1)) * side
        pixels, recolored = people.pixels(index), torch.zeros(batch, dtype=torch.bool)
        if stage.recolored:
            recolored = torch.from_numpy(rng.random(batch) < stage.recolored)
            pixels = recolor(pixels, people.masks(index) * recolored[:, None, None, None], rng)
        x = crops(pixels, torch.from_numpy(box).float(), size)
        outer, inner = model.embeddings(degrade(x, rng))
        target = torch.from_numpy(names[index])
        loss, right = model.head(outer, target)
        inner_loss, _ = model.inner_head(inner, target)
        told = {"outer": loss, "inner": inner_loss, "right": right}
        if not values:
            return {"loss": loss + inner_loss, **told}
        logits = {name: head(inner) for name, head in model.features.items()}
        features, read = classify(logits, visible(shown, index, recolored))
        total = loss + inner_loss + stage.feature_weight * features
        return {"loss": total, **told, "features": features, "features read": read}

    return train(folder, model, stage, losses).encoder
