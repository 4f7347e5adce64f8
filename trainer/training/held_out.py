"""The loss on people who are not trained on: the same photos, timesteps and noise every time, so a curve of it shows
the adapter and not the draw."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import Config
from ..data import randomness
from ..data.batch import Batch, collate
from ..data.dataset import FaceDataset
from ..models.adapter import Models
from .step import AdapterStep, Features, Plan, encode_batch


class HeldOutLoss:
    """Mean loss over held-out samples with their faces and captions, by ``loss.kind``.

    Everything the encoders have to do is done here, before training starts, so they may be released after.

    Args:
        config: ``loss``, ``validation.loss_samples`` and the batch of a pass are read.
        dataset: of the run.
        held: indices of the photos that are held out.
        processes: between which ``train.batch_size`` is split.
    """

    def __init__(
        self, config: Config, models: Models, dataset: FaceDataset, held: Sequence[int], accelerator: Accelerator
    ) -> None:
        self._models, self._accelerator = models, accelerator
        own = {"face_dropout": 0.0, "text_dropout": 0.0, "standard_probability": 0.0}
        loss = config.loss.model_copy(update=own)
        self._kind = loss.kind
        self._step = AdapterStep(replace(models, recogniser=None), loss, config.adapter.combination)
        samples = copy.copy(dataset)
        samples.loss, samples.chosen = loss, held
        count = min(config.validation.loss_samples, len(held))
        chosen = [int(held[place]) for place in randomness.permutation(len(held), "held-out samples")[:count].tolist()]
        share = config.train.batch_size // (accelerator.num_processes * config.optimiser.accumulation)
        self._batches: list[tuple[Batch, Features]] = []
        for first in range(0, count, share):
            batch = collate([samples[index, 0] for index in chosen[first : first + share]])
            features = encode_batch(batch.to(models.frozen.device), models.frozen, models.encoder)
            batch = replace(batch, pixels=None, crops=None, moments=None, hidden=None, text=None)
            self._batches.append((batch, _to(features, "cpu")))

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """``held-out loss``, and the same by ranges of the timesteps."""
        values: dict[str, list[float]] = {}
        for batch, features in self._batches:
            plan = Plan.of([False] * len(batch), batch.standard_loss, self._kind, self._models.adapter.config.null)
            device = self._models.frozen.device
            with self._accelerator.autocast():
                _, losses, _ = self._step.loss(batch.to(device), _to(features, device), plan)
            for name, loss in zip(self._step.timestep_ranges(batch.timesteps.tolist()), losses.tolist(), strict=True):
                values.setdefault("held-out loss", []).append(loss)
                values.setdefault(f"held-out {name}", []).append(loss)
        return {name: sum(found) / len(found) for name, found in sorted(values.items())}


def _to(features: Features, device: torch.device | str) -> Features:
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    text = {name: tensor.to(device) for name, tensor in features.text.items()}
    return replace(features, latents=move(features.latents), text=text, hidden=move(features.hidden))
