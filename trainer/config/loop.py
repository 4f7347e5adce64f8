"""The settings of the loop, whatever is trained: optimiser, length, checkpoints, logs."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from .fields import Count, NotNegative, PathText, Positive, PositiveFloat, Seed, Text
from .settings import Section

Argument = Annotated[str, Field(pattern=r"^\w{1,100}$")]
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimiserSettings(Section):
    """Which optimiser, and its rate."""

    name: Annotated[Text, Field(pattern=r"\S", max_length=200)] = "adamw"
    """adamw, adamw8bit (package bitsandbytes), prodigy (prodigyopt, with lr=1), a class of torch.optim such as NAdam,
    or package.Class of anything installed."""
    options: Annotated[dict[Argument, bool | int | float | Text | None], Field(max_length=100)] = {}
    """Further arguments of the optimiser by name, such as optimiser.options.d_coef=0.5."""
    lr: Annotated[float, Field(gt=0, le=10)] = 2e-5
    """Learning rate after the warm-up."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """Decay of the running means; the published training has (0.9, 0.9)."""
    weight_decay: NotNegative = 0.03
    eps: Annotated[float, Field(ge=1e-20, le=1)] = 1e-8
    warmup_steps: Count = 100
    """Optimiser steps of linear warm-up, whatever the number of processes."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up, until train.steps."""
    clip: PositiveFloat | None = 1.0
    """Largest norm of the gradient; null does not clip."""
    accumulation: Annotated[int, Field(gt=0, le=65536)] = 1
    """Backward passes for one optimiser step; train.batch_size is split into so many parts."""
    fused: bool = True
    """The fused AdamW of torch; other optimisers do not read it."""


class TrainSettings(Section):
    """Length, seed, checkpoints and logs."""

    output: Annotated[PathText, AfterValidator(os.path.expanduser)]
    """Folder of checkpoints, logs and adapters."""
    steps: Annotated[int, Field(gt=0, le=10**9)] = 50_000
    """Optimiser steps."""
    batch_size: Annotated[int, Field(gt=0, le=65536)] = 16
    """Samples of one optimiser step over all processes: it has to divide by processes × accumulation."""
    unet: Literal["frozen", "lora", "full"] = "frozen"
    """What of the base's U-Net is trained along with the adapter: nothing, a LoRA (adapter.lora), or all of it."""
    seed: Seed = 0
    """Order, flips, references, dropout, timesteps, noise and initial weights follow from it."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights; null keeps none."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints."""
    background_saves: bool = True
    """Checkpoints amid the run are copied into memory and written by a thread, while training goes on."""
    keep: Positive = 3
    """Newest checkpoints kept."""
    sharding: Literal["none", "fsdp2"] = "none"
    """fsdp2: each of several processes keeps its part of weights, optimiser and moving average, and of checkpoints."""
    resume: bool = True
    """Go on from the newest sound checkpoint of the output folder."""
    log_every: Positive = 10
    """Steps between log lines."""
    validate_every: Positive | None = 1000
    """Steps between validation pictures; null makes none."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where curves and pictures go."""
    timeout_minutes: Annotated[float, Field(ge=0.01, le=1e6)] = 120.0
    """How long processes wait for one another (pictures, checkpoints, reading the cache) before the run is given up."""
    deterministic: bool = True
    """Deterministic kernels: a resumed run is bit-identical. Slightly slower on some GPUs."""

    @model_validator(mode="after")
    def _check_sharding(self) -> Self:
        if self.sharding != "none" and self.unet != "frozen":
            raise ValueError(
                f"train.sharding={self.sharding} shards adapters alone; with train.unet={self.unet} set it to none"
            )
        return self
