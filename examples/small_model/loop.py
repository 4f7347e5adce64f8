"""One training loop for every stage of the small system: seeded by step, checkpointed, resumable, logged.

Whatever a step draws at random comes from ``(seed, step)``, so a run that was interrupted gives the same weights as
one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .muon import Muon


@dataclass(frozen=True)
class LoopConfig:
    """Length and optimiser of a stage; the rate warms up linearly and falls along a cosine to zero."""

    steps: int
    batch: int
    rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    average: float = 0.999  # decay of the moving average of the weights, which is what the stage hands on
    seed: int = 0
    checkpoint_seconds: float = 120.0

    def rate_at(self, step: int) -> float:
        """Learning rate of ``step``, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimisers_of(module: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """Muon for matrices and convolutions, AdamW for embeddings, heads and vectors."""
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if p.ndim > 1 and id(p) not in embedded and "head" not in name]
    chosen = {id(p) for p in muon}
    rest = [p for _, p in named if id(p) not in chosen]
    return [
        Muon(muon, lr=config.rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.rate, betas=config.betas, weight_decay=0.0),
    ]


StepLoss = Callable[[int, np.random.Generator], dict[str, Tensor]]


def train(name: str, folder: Path, module: nn.Module, config: LoopConfig, loss_of: StepLoss, log=print) -> nn.Module:
    """Trains ``module`` and leaves it in evaluation mode with its averaged weights.

    Args:
        name: for the log, ``folder/<name>.jsonl``, and the checkpoint, ``folder/<name>.pt``.
        loss_of: given the step and its random generator, the terms of the loss by name; the entry ``loss`` is
        minimised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizers = optimisers_of(module, config)
    averaged = [p.detach().clone() for p in weights]
    path = folder / f"{name}.pt"
    start = 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        averaged = state["averaged"]
        start = state["step"]
        log(f"{name}: goes on at step {start} of {config.steps}")
    module.train()
    began = saved = time.monotonic()
    terms: dict[str, float] = {}
    for step in range(start, config.steps):
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = config.rate_at(step)
        torch.manual_seed((config.seed * 1_000_003 + step) % 2**31)
        losses = loss_of(step, np.random.default_rng([config.seed, step]))
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(weights, config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # the average follows fast at first, so that a short run is not dominated by its beginning
        decay = min(config.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in weights], 1 - decay)
        for key, value in losses.items():
            terms[key] = 0.98 * terms.get(key, float(value.detach())) + 0.02 * float(value.detach())
        last = step + 1 == config.steps
        if (step + 1) % 50 == 0 or last:
            record = {
                "step": step + 1,
                "seconds": round(time.monotonic() - began, 1),
                **{k: round(v, 5) for k, v in terms.items()},
            }
            with (folder / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            log(f"{name}: {json.dumps(record)}")
        if last or time.monotonic() - saved > config.checkpoint_seconds:
            state = {"module": module.state_dict(), "averaged": averaged, "step": step + 1}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            saved = time.monotonic()
    with torch.no_grad():
        for weight, value in zip(weights, averaged, strict=True):
            weight.copy_(value)
    return module.eval()


def averaged(name: str, folder: Path, module: nn.Module) -> tuple[nn.Module, int]:
    """``module`` with the averaged weights of the latest checkpoint, for a look during training, and its step."""
    state = torch.load(folder / f"{name}.pt", weights_only=True)
    module.load_state_dict(state["module"])
    with torch.no_grad():
        for weight, value in zip([p for p in module.parameters() if p.requires_grad], state["averaged"], strict=True):
            weight.copy_(value)
    return module.eval(), state["step"]


def pixels(pictures: np.ndarray) -> Tensor:
    """Bytes ``(N, H, W, 3)`` as floats ``(N, 3, H, W)`` in -1…1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
