"""One forward pass of training: what is encoded, which rows of a batch need what, and the loss.

Rows that cannot teach anything are left out: a dropped face whose branches are switched off predicts exactly
what the frozen model predicts, so it has no gradient. The frozen model's own prediction is computed without
gradient, and only for the rows whose loss contains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from feedface_core.conditioning import Rows, combine_references
from feedface_core.modules.adapter import FaceAdapter
from trainer.models.frozen_model import Base, Text

from .losses import LossKind, min_snr_weights, sample_losses

if TYPE_CHECKING:
    from ..config import LossSettings
    from ..data.batch import Batch
    from ..models.face_encoder import FaceEncoder


@dataclass(frozen=True)
class Plan:
    """Which rows of a batch are trained, in which order; decided in Python, from what the data drew.

    Args:
        rows: indices into the batch: those with a face first, then those with the adapter's null face.
        faces: how many of them have a face.
        kinds: the loss of each of ``rows``.
        originals: positions in ``rows`` that need the frozen model's own prediction.
    """

    rows: tuple[int, ...]
    faces: int
    kinds: tuple[LossKind, ...]
    originals: tuple[int, ...]

    @classmethod
    def of(cls, drop_face: Sequence[bool], standard: Sequence[bool], kind: LossKind, null: str) -> Plan:
        """The plan for decisions drawn for each sample.

        Args:
            drop_face, standard: for each sample, whether its face is dropped and whether it has the standard
                loss.
            kind: the loss of the others.
            null: what a dropped face is to the adapter; ``off`` leaves those rows out.
        """
        with_face = [row for row, dropped in enumerate(drop_face) if not dropped]
        without = [row for row, dropped in enumerate(drop_face) if dropped and null != "off"]
        rows = (*with_face, *without)
        kinds: tuple[LossKind, ...] = tuple("standard" if standard[row] else kind for row in rows)
        originals = tuple(place for place, own in enumerate(kinds) if own == "regularised")
        return cls(rows, len(with_face), kinds, originals)


@dataclass
class Features:
    """What the frozen parts make of a batch: ``(B, …)`` latents, text states, and the hidden states
    ``(R, T, E)`` of all references (None without any)."""

    latents: Tensor
    text: Text
    hidden: Tensor | None


@torch.no_grad()
def encode_batch(batch: Batch, base: Base, encoder: FaceEncoder | None) -> Features:
    """Latents, text states and hidden states of a batch, from its cached features where it has them."""
    device = base.device
    moments = base.encode_pixels(batch.pixels) if batch.moments is None else batch.moments.to(device)
    latents = base.sample_latents(moments, batch.latent_noise.to(device))
    if batch.text is None:
        distinct = list(dict.fromkeys(batch.captions))  # dropped captions are all the same
        states = base.encode_text(distinct)
        places = torch.tensor([distinct.index(caption) for caption in batch.captions], device=device)
        text = {name: tensor[places] for name, tensor in states.items()}
    else:
        text = {name: tensor.to(device) for name, tensor in batch.text.items()}
    hidden = batch.hidden
    if hidden is None and batch.crops is not None:
        if encoder is None:
            raise ValueError("the batch holds face crops, but no encoder was loaded")
        hidden = encoder.encode(batch.crops)
    return Features(latents, text, None if hidden is None else hidden.to(device).float())


class TrainingStep(nn.Module):
    """Batch → loss. The adapter is its only submodule, so that wrapping it for several processes sees just
    what is trained.

    Args:
        adapter: attached to the base.
        base: the frozen model.
        settings: the ``loss`` section of the configuration.
        combination: how several references become one context.
    """

    def __init__(self, adapter: FaceAdapter, base: Base, settings: LossSettings, combination: str = "concat"):
        super().__init__()
        self.adapter = adapter
        self.base = base
        self.settings = settings
        self.combination = combination

    def plan(self, batch: Batch) -> Plan:
        """Which rows of the batch are trained, and how."""
        return Plan.of(batch.drop_face, batch.standard_loss, self.settings.kind, self.adapter.config.null)

    def forward(self, batch: Batch, features: Features, plan: Plan) -> tuple[Tensor, Tensor]:
        """
        Args:
            batch: B samples, on the base's device.
            features: of the batch.
            plan: of the batch.

        Returns:
            The loss to minimise, ``Σ losses / B``, and the losses of the plan's rows ``(len(plan.rows),)``,
            float32, without gradient.
        """
        unused = self._unused(plan)
        touch = sum((parameter.sum() for parameter in unused), torch.zeros((), device=self.base.device)) * 0.0
        if not plan.rows:
            return touch, torch.zeros(0, device=self.base.device)
        device, schedule = self.base.device, self.base.schedule
        rows = torch.tensor(plan.rows, device=device)
        latents, noise = features.latents[rows], batch.noise.to(device)[rows]
        timesteps = batch.timesteps.to(device)[rows]
        text = {name: tensor[rows] for name, tensor in features.text.items()}
        noisy = schedule.add_noise(latents, noise, timesteps)
        original = None
        if plan.originals:
            chosen = torch.tensor(plan.originals, device=device)
            with torch.no_grad():
                own_text = {name: tensor[chosen] for name, tensor in text.items()}
                original = self.base.predict(noisy[chosen], timesteps[chosen], own_text)
        faces = self._face_rows(plan, batch, features)
        prediction = self.base.predict(noisy, timesteps, text, faces)
        weights = self.base.loss_weights(batch.masks.to(device)[rows], latents)
        target = schedule.target(latents, noise, timesteps)
        importance = self.base.importance(latents, self.settings.image_token_weight)
        losses = sample_losses(prediction, target, weights, plan.kinds, original, self.settings.normalise, importance)
        weighted = losses
        if self.settings.min_snr_gamma is not None:
            weighted = losses * min_snr_weights(
                schedule.snr(timesteps), self.settings.min_snr_gamma, schedule.prediction
            )
        # Divided by the whole batch: the same gradient however the batch is split, and whichever rows teach.
        return weighted.sum() / len(batch) + touch, losses.detach()

    def _face_rows(self, plan: Plan, batch: Batch, features: Features) -> Rows:
        rows = []
        if plan.faces:
            # References come in the order of the samples, and so do the rows that carry a face.
            counts = [batch.reference_counts[row] for row in plan.rows[: plan.faces]]
            tokens, bias = combine_references(features.hidden, counts, self.combination)
            rows.append((plan.faces, self.adapter.control(self.adapter.project(tokens), bias)))
        dropped = len(plan.rows) - plan.faces
        if dropped:
            rows.append((dropped, self.adapter.null_control(self.base.device, torch.float32)))
        return rows

    def _unused(self, plan: Plan) -> list[nn.Parameter]:
        """Parameters this batch does not reach; several processes have to agree that their gradient is
        zero.
        """
        if not plan.rows:
            return list(self.adapter.parameters())
        unused = []
        if not plan.faces and self.adapter.config.null == "learned":
            unused += list(self.adapter.projection.parameters())
        if plan.faces == len(plan.rows) and self.adapter.config.null == "learned":
            unused.append(self.adapter.null_tokens)
        return unused
