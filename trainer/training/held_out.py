"""The loss on people who are not trained on: the same photos, timesteps and noise every time, so a curve of it shows
the adapter and not the draw."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from ..config import Config
from ..data import randomness
from ..data.batch import Batch, collate
from ..data.dataset import FaceDataset
from ..data.pictures import Size
from ..models.adapter import Models
from .step import AdapterStep, Features, encode_batch


class HeldOutLoss:
    """Mean loss over held-out samples with their faces and captions, by ``loss.kind``.

    Everything the encoders have to do is done here, before training starts, so they may be released after.

    Args:
        config: ``loss``, ``validation.loss_samples`` and the batch of a pass are read.
        dataset: of the run.
        held: indices of the photos that are held out.
        accelerator: of the process.
    """

    def __init__(
        self, config: Config, models: Models, dataset: FaceDataset, held: Sequence[int], accelerator: Accelerator
    ) -> None:
        self._models, self._accelerator = models, accelerator
        own = dict.fromkeys(("face_dropout", "background_dropout", "text_dropout", "standard_probability"), 0.0)
        loss = config.loss.model_copy(update=own)
        self._step = AdapterStep(replace(models, recogniser=None), loss, config.adapter.combination)
        samples = copy.copy(dataset)
        samples.loss, samples.chosen = loss, held
        count = min(config.validation.loss_samples, len(held))
        chosen = [int(held[place]) for place in randomness.permutation(len(held), "held-out samples")[:count].tolist()]
        share = config.train.batch_size // (accelerator.num_processes * config.optimiser.accumulation)
        self._batches: list[tuple[Batch, Features]] = []
        sizes: dict[Size, list[int]] = {}  # a batch is of one size
        for index in chosen:
            sizes.setdefault(samples.size_of(index), []).append(index)
        for own in (one[first : first + share] for one in sizes.values() for first in range(0, len(one), share)):
            batch = collate([samples[index, 0] for index in own])
            batch = batch.to(models.frozen.device)
            features = encode_batch(batch, models.frozen, models.encoder)
            encoded = ("pixels", "moments", "crops", "hidden", "backgrounds", "background_hidden", "text")
            batch = replace(batch.to("cpu"), **dict.fromkeys(encoded))
            self._batches.append((batch, _to(features, "cpu")))

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """``held-out loss``, and the same by ranges of the timesteps."""
        values: dict[str, list[float]] = {}
        for batch, features in self._batches:
            device = self._models.frozen.device
            with self._accelerator.autocast():
                _, losses, _ = self._step.loss(batch.to(device), _to(features, device), self._step.plan(batch))
            for name, loss in zip(self._step.timestep_ranges(batch.timesteps.tolist()), losses.tolist(), strict=True):
                values.setdefault("held-out loss", []).append(loss)
                values.setdefault(f"held-out {name}", []).append(loss)
        return {name: sum(found) / len(found) for name, found in sorted(values.items())}


def _to(features: Features, device: torch.device | str) -> Features:
    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tensor.to(device) for name, tensor in value.items()}
        return None if value is None else value.to(device)

    return Features(**{name: move(value) for name, value in vars(features).items()})
