"""The stages of the small model as uses of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.models.precision import fastest_precision
from trainer.training.checkpoint import load_latest, run_lock
from trainer.training.metrics import Record
from trainer.training.stopping import Interrupted, StopRequest
from trainer.training.trainer import Trainer

from .muon import make_optimisers
from .settings import Stage

Losses = Callable[[int, np.random.Generator], dict[str, Tensor]]


class StageStep(nn.Module):
    """The number of a step → its loss. Whatever the step draws at random follows from its number and the seed.

    Args:
        model: what is trained.
        losses: from the number and its generator to the terms of the loss by name; ``loss`` is minimised.
        settings: of the stage.
    """

    def __init__(self, model: nn.Module, losses: Losses, settings: Stage) -> None:
        super().__init__()
        self.model, self.losses, self.settings = model, losses, settings

    def forward(self, number: int) -> tuple[Tensor, Record]:
        seed = self.settings.seed
        torch.manual_seed((seed * 1_000_003 + number) % 2**31)
        terms = self.losses(number, np.random.default_rng([seed, number]))
        values = {name: value.detach().reshape(1) for name, value in terms.items()}
        return terms["loss"], Record(self.settings.batch_size, losses=values.pop("loss"), values=values)


def train(folder: Path, model: nn.Module, settings: Stage, losses: Losses) -> nn.Module:
    """Trains a model on the CPU with the trainer's loop; goes on where it stopped.

    Returns:
        The model in evaluation mode with its averaged weights.

    Raises:
        Interrupted: a signal has stopped the run; it has left a checkpoint.
    """
    with run_lock(folder), StopRequest() as stop:
        trainer = Trainer(
            settings.model_copy(update={"output": str(folder)}),
            settings.optimiser,
            Accelerator(cpu=True, mixed_precision="no" if fastest_precision() == "fp32" else "bf16"),
            StageStep(model.train(), losses, settings),
            model,
            count,
            optimisers=make_optimisers(model, settings.optimiser),
            stop=stop,
        )
        if not trainer.run():
            raise Interrupted(f"stopped; `python -m examples.small_model.build` goes on with {folder}")
    model.load_state_dict(load_latest(folder).weights())
    return model.eval()
