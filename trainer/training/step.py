"""One forward pass of adapter training: what is encoded, which rows of a batch need what, and the loss.

Rows that cannot teach anything are left out: a dropped face whose branches are switched off predicts exactly what the
frozen model predicts, so it has no gradient. The frozen model's own prediction is computed without gradient, and only
for the rows whose loss contains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from feedface_core.conditioning import Face, FaceControl, People, Rows, combine_references, latent_masks
from feedface_core.faces.regions import BOX_SCALE, region_masks

from ..config import LossSettings
from ..data.batch import Batch
from ..models.adapter import Models
from ..models.face_encoder import FaceEncoder
from ..models.frozen_model import FrozenModel, Text
from ..models.precision import full_precision
from ..models.unet import released
from .identity import IdentityLoss
from .losses import LossKind, min_snr_weights, sample_losses
from .metrics import Record

TIMESTEP_RANGES = 4  # the loss is logged for each of them


@dataclass(frozen=True)
class Plan:
    """Which rows of a batch are trained, in which order; decided in Python, from what the data drew.

    Args:
        rows: indices into the batch: those with a face first, then those with the adapter's null face.
        faces: how many of them have a face.
        kinds: the loss of each of ``rows``.
        originals: positions in ``rows`` that need the frozen model's own prediction.
        decoded: positions in ``rows`` whose face a recogniser judges.
    """

    rows: tuple[int, ...]
    faces: int
    kinds: tuple[LossKind, ...]
    originals: tuple[int, ...]
    decoded: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        drop_face: Sequence[bool],
        standard: Sequence[bool],
        kind: LossKind,
        null: str,
        near: Sequence[bool] | None = None,
        beside: Sequence[bool] | None = None,
    ) -> Plan:
        """The plan for decisions drawn for each sample.

        Args:
            drop_face, standard: for each sample, whether its face is dropped and whether it has the standard loss.
            kind: the loss of the others.
            null: what a dropped face is to the adapter; ``off`` leaves those rows out.
            near: for each sample, whether its predicted picture is decoded; None decodes none.
            beside: for each sample, whether it teaches without a face as well: its background, or the U-Net.
        """
        with_face = [row for row, dropped in enumerate(drop_face) if not dropped]
        kept = [null != "off"] * len(drop_face) if beside is None else [null != "off" or one for one in beside]
        without = [row for row, dropped in enumerate(drop_face) if dropped and kept[row]]
        rows = (*with_face, *without)
        kinds: tuple[LossKind, ...] = tuple("standard" if standard[row] else kind for row in rows)
        originals = tuple(index for index, own in enumerate(kinds) if own == "regularised")
        decoded = () if near is None else tuple(index for index, row in enumerate(with_face) if near[row])
        return cls(rows, len(with_face), kinds, originals, decoded)


@dataclass
class Features:
    """What the frozen models make of a batch: ``(B, …)`` latents, text states, and the hidden states ``(R, T, E)`` of
    all references and ``(G, T, E)`` of the backgrounds (None without any)."""

    latents: Tensor
    text: Text
    hidden: Tensor | None
    background: Tensor | None = None


def encode_batch(batch: Batch, frozen: FrozenModel, encoder: FaceEncoder) -> Features:
    """Latents, text states and hidden states of a batch, from its cached features where it has them."""
    device = frozen.device
    with full_precision(device):
        moments = frozen.encode_pixels(batch.pixels) if batch.moments is None else batch.moments.to(device)
        latents = frozen.sample_latents(moments, batch.latent_noise.to(device))
        if batch.text is None:
            distinct = list(dict.fromkeys(batch.captions))  # dropped captions are all the same
            index = torch.tensor([distinct.index(caption) for caption in batch.captions], device=device)
            text = {name: states[index] for name, states in frozen.encode_text(distinct).items()}
        else:
            text = {name: states.to(device) for name, states in batch.text.items()}
        hidden = batch.hidden
        if hidden is None and batch.crops is not None:
            hidden = encoder.encode(batch.crops)
        background = batch.background_hidden
        if background is None and batch.backgrounds is not None:
            background = encoder.encode(batch.backgrounds)
    hidden, background = (None if one is None else one.to(device).float() for one in (hidden, background))
    return Features(latents, text, hidden, background)


class AdapterStep(nn.Module):
    """Batch → loss. What is trained are its only submodules, so that wrapping it for several processes sees just that:
    the adapter, and the U-Net if it is trained.

    Args:
        models: the adapter, attached to its frozen model.
        settings: the ``loss`` section of the configuration.
        combination: how several references become one context.
    """

    def __init__(self, models: Models, settings: LossSettings, combination: str = "concat") -> None:
        super().__init__()
        self.frozen, self.encoder, self.adapter = models.frozen, models.encoder, models.adapter
        self.unet, self.host = models.unet, models.unet and models.unet.host
        self.settings, self.combination, self.identity = settings, combination, None
        if models.recogniser is not None:
            fill = models.adapter.config.encoder.crop_fill
            self.identity = IdentityLoss(models.frozen, models.recogniser, settings.identity, fill)

    def plan(self, batch: Batch) -> Plan:
        """Which rows of the batch are trained, and how."""
        near = None if self.identity is None else self.identity.near(batch)
        second, config = self.adapter.config.background, self.adapter.config
        beside = second and [not dropped or second.null != "off" for dropped in batch.drop_background]
        if self.unet is not None:  # which learns from every row
            beside = [True] * len(batch)
        return Plan.of(batch.drop_face, batch.standard_loss, self.settings.kind, config.null, near, beside)

    def forward(self, batch: Batch) -> tuple[Tensor, Record]:
        """B samples → the loss to minimise, ``Σ losses / B``, and the losses of the trained rows with what they are
        of."""
        plan = self.plan(batch)
        ranges = self.timestep_ranges(batch.timesteps.tolist())
        record = {
            "samples": len(batch),
            "ids": [batch.ids[row] for row in plan.rows],
            "groups": [(f"loss by kind/{kind}", ranges[row]) for row, kind in zip(plan.rows, plan.kinds, strict=True)],
            "values": {"mask area": batch.masks.mean((1, 2, 3))[list(plan.rows)]},
            "unreadable": batch.unreadable,
        }
        batch = batch.to(self.frozen.device)
        loss, losses, values = self.loss(batch, encode_batch(batch, self.frozen, self.encoder), plan)
        record["values"] |= values
        return loss, Record(losses=losses, **record)

    def timestep_ranges(self, timesteps: Sequence[int]) -> list[str]:
        """The name under which the loss of each timestep is averaged as well."""
        count, steps = TIMESTEP_RANGES, self.frozen.scheduler.config.num_train_timesteps
        firsts = [-(-index * steps // count) for index in range(count + 1)]
        return [
            f"loss by timestep/{firsts[index]:04d} to {firsts[index + 1] - 1:04d}"
            for index in (timestep * count // steps for timestep in timesteps)
        ]

    def loss(self, batch: Batch, features: Features, plan: Plan) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss to minimise; the losses of the plan's rows ``(len(plan.rows),)``, float32, without gradient; and
        other numbers to log.

        Args:
            batch: B samples, on the frozen model's device.
            features, plan: of the batch.
        """
        frozen, device = self.frozen, self.frozen.device
        touch = sum((value.sum() for value in self._unused(plan, batch)), torch.zeros((), device=device)) * 0.0
        if not plan.rows:
            return touch, torch.zeros(0, device=device), {}
        rows = torch.tensor(plan.rows, device=device)
        latents, noise, timesteps = features.latents[rows], batch.noise[rows], batch.timesteps[rows]
        text = {name: states[rows] for name, states in features.text.items()}
        noisy = frozen.scheduler.add_noise(latents, noise, timesteps)
        original = None
        if plan.originals:
            index = torch.tensor(plan.originals, device=device)
            with torch.no_grad(), released(self.unet):
                own_text = {name: states[index] for name, states in text.items()}
                original = frozen.predict(noisy[index], timesteps[index], own_text)
        prediction = frozen.predict(noisy, timesteps, text, self._face_rows(plan, batch, features))
        losses = sample_losses(
            prediction,
            frozen.target(latents, noise, timesteps),
            frozen.loss_weights(batch.masks[rows], latents),
            plan.kinds,
            original,
            self.settings.normalise,
            frozen.importance(latents, self.settings.image_token_weight),
        )
        weighted = losses
        if self.settings.min_snr_gamma is not None:
            snr = compute_snr(frozen.scheduler, timesteps)
            weighted = losses * min_snr_weights(snr, self.settings.min_snr_gamma, frozen.prediction)
        total, values = weighted.sum(), {}
        if plan.decoded:
            likeness, values = self._identity(plan, batch, features, frozen.clean(noisy, prediction, timesteps))
            total = total + likeness.sum()
        # Divided by the whole batch: the same gradient however the batch is split, and whichever rows teach.
        return total / len(batch) + touch, losses.detach(), values

    def _identity(
        self, plan: Plan, batch: Batch, features: Features, clean: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = plan.rows[: plan.faces]
        counts = [count for row in rows for count in batch.people[row]]
        references = self.identity.references(batch, features.hidden, counts)
        return self.identity(clean, self.identity.judged(batch, rows, plan.decoded), references)

    def _face_rows(self, plan: Plan, batch: Batch, features: Features) -> Rows:
        """What acts on the plan's rows, as runs in which each stream is there for all rows or dropped for all; a
        picture with several people is a run by itself."""
        adapter, second, where = self.adapter, self.adapter.background, (self.frozen.device, torch.float32)
        tokens = bias = None
        if plan.faces:
            # References come in the order of the samples, and so do the rows that carry a face.
            counts = [batch.reference_counts[row] for row in plan.rows[: plan.faces]]
            combination = "average" if adapter.config.text_tokens else self.combination
            hidden, bias = combine_references(features.hidden, counts, combination)
            tokens = adapter.project(hidden)
        places = list(accumulate((not dropped for dropped in batch.drop_background), initial=0))
        several = {place for place in range(plan.faces) if len(batch.people[plan.rows[place]]) > 1}
        kinds = [
            (place < plan.faces, not batch.drop_background[row], place if place in several else None)
            for place, row in enumerate(plan.rows)
        ]
        rows: list[tuple[int, FaceControl | None]] = []
        for (face, beside, group), run in groupby(enumerate(kinds), key=lambda entry: entry[1]):
            run = [place for place, _ in run]
            own = slice(run[0], run[-1] + 1)
            if second is None:
                background = None
            elif beside:
                index = torch.tensor([places[plan.rows[place]] for place in run], device=where[0])
                background = second.control(second.project(features.background[index]))
            else:
                background = second.null_control(*where)
            if group is not None:
                control = self._people(batch, plan.rows[group], features.hidden.split(counts)[group], background)
            elif face:
                control = adapter.control(tokens[own], None if bias is None else bias[own], background=background)
            elif (null := adapter.null(*where)) is not None:
                control = adapter.control(null, background=background)
            else:
                control = background and FaceControl(background=background)
            rows.append((len(run), control))
        return rows

    def _people(self, batch: Batch, row: int, hidden: Tensor, background: FaceControl | None) -> FaceControl:
        """The control of a row with several people, each in the region of the own box, as FeedFace Regions makes it of
        boxes.

        Args:
            hidden: of the references of all of them.
        """
        faces = [Face(own, combination=self.combination) for own in hidden.split(list(batch.people[row]))]
        height, width = (cells * self.frozen.cell for cells in batch.masks.shape[-2:])
        masks = region_masks([face.box for face in batch.faces[row]], BOX_SCALE, height, width)
        fields = {"regions": latent_masks(masks, batch.masks), "background": background}
        return self.adapter.control_of(People(tuple(faces), masks), self.frozen.device, torch.float32, **fields)

    def _unused(self, plan: Plan, batch: Batch) -> list[nn.Parameter]:
        """Parameters this batch does not reach; several processes have to agree that their gradient is zero."""
        unused: list[nn.Parameter] = []
        there = {
            "face": [place < plan.faces for place in range(len(plan.rows))],
            "background": [not batch.drop_background[row] for row in plan.rows],
        }
        for stream in self.adapter.streams:
            own, null = there[stream.config.stream], stream.config.null
            other = [] if stream.background is None else [*stream.background.parameters()]
            parameters = [one for one in stream.parameters() if not any(one is different for different in other)]
            if not any(own) and (null == "off" or all(own)):  # all of none: there are no rows
                unused += parameters
            elif null == "learned":
                unused += [] if any(own) else list(stream.projection.parameters())
                unused += [stream.null_tokens] if all(own) else []
        return unused
