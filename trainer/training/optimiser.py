"""AdamW, and a learning-rate schedule without state."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..config import OptimiserSettings


def make_optimiser(parameters: Iterable[nn.Parameter], settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW over the trained parameters. Norms, biases and null tokens are not decayed."""
    decayed, others = [], []
    for value in parameters:
        (decayed if value.dim() == 2 else others).append(value)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=settings.fused,
    )


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """Learning rate of optimiser step ``step`` (from 0): a function of the step alone, whatever the number of
    processes, so there is nothing to save and nothing that runs too fast.

    Linear warm-up that reaches ``lr`` at step ``warmup_steps``, then constant, linear to 0 or half a cosine to 0.
    """
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    done = (step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
    done = min(max(done, 0.0), 1.0)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return settings.lr * warmup * shape[settings.schedule]
