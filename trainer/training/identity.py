"""The identity loss: the predicted clean picture decoded, its face cut out and recognised, all with a gradient.

At low noise the prediction amounts to a clean picture, which a recogniser trained on photos can judge; at high noise it
is a blur. So only rows below a noise level are decoded, one after the other, and their decoder runs again in the
backward pass: the memory of one picture's activations, whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from feedface_core.faces import FILL, cut_squares
from feedface_core.faces.box import Box
from feedface_core.modules.likeness import EncoderLikeness, Likeness, mean_vectors

from ..config import IdentityLossSettings
from ..data.batch import Batch
from ..models.frozen_model import FrozenModel
from ..models.precision import full_precision
from .losses import identity_losses


@dataclass(frozen=True)
class Judged:
    """What is asked of one face in the pictures of a forward pass.

    Args:
        position: of its row among those that were predicted.
        square: where it is, in pixels of the picture.
        own: which of the batch's faces it is, in the order of their references.
        others: which of them are other people.
    """

    position: int
    square: Box
    own: int
    others: tuple[int, ...]


class IdentityLoss:
    """Prediction → losses of the faces in it.

    Args:
        frozen: decodes.
        recogniser: recognises.
        settings: ``loss.identity``.
        fill: grey past the border of a face crop, 0…1, as the adapter's crops have it.
    """

    def __init__(
        self, frozen: FrozenModel, recogniser: Likeness, settings: IdentityLossSettings, fill: float = FILL
    ) -> None:
        self.frozen, self.recogniser, self.settings, self.fill = frozen, recogniser, settings, fill

    def near(self, batch: Batch) -> list[bool]:
        """Which samples are below the noise level and show a face."""
        limit = self.settings.below * self.frozen.scheduler.config.num_train_timesteps
        return [
            step < limit and not dropped and any(face.square for face in faces)
            for step, dropped, faces in zip(batch.timesteps.tolist(), batch.drop_face, batch.faces, strict=True)
        ]

    def judged(self, batch: Batch, rows: tuple[int, ...], positions: tuple[int, ...]) -> list[Judged]:
        """The faces to judge.

        Args:
            rows: of the batch, with a face, in the order of the references.
            positions: among ``rows``, those to judge.
        """
        known = [(position, face) for position, row in enumerate(rows) for face in batch.faces[row]]
        people = [face.identity for _, face in known]
        return [
            Judged(position, face.square, own, tuple(i for i, one in enumerate(people) if one != face.identity))
            for own, (position, face) in enumerate(known)
            if face.square is not None and position in positions
        ]

    def references(self, batch: Batch, hidden: Tensor, counts: list[int]) -> Tensor:
        """One unit vector for each face with references ``(F, D)``, without gradient."""
        with full_precision(self.frozen.device):
            if isinstance(self.recogniser, EncoderLikeness):
                vectors = self.recogniser.of_hidden(hidden)
            else:
                vectors = self.recogniser.vectors(batch.crops.to(self.frozen.device).movedim(-1, 1))
            return mean_vectors(vectors, counts)

    def __call__(self, clean: Tensor, faces: list[Judged], references: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted losses of the faces, ``(N,)``, and what is logged of them, each ``(N,)`` without gradient.

        Args:
            clean: predicted latents of all rows.
            faces: N of them.
            references: of :meth:`references`.
        """
        settings = self.settings
        with full_precision(self.frozen.device, gradient=True):
            rows = [clean[face.position : face.position + 1].float() for face in faces]
            crops = [
                checkpoint(self._cut, row, face.square, use_reentrant=False)
                for row, face in zip(rows, faces, strict=True)
            ]
            found = self.recogniser.vectors(torch.cat(crops))
            own, others = [face.own for face in faces], [face.others for face in faces]
            away, contrast = identity_losses(found, references, own, others, settings.temperature)
        values = {"identity/likeness": 1.0 - away.detach()}
        if settings.contrastive:
            values["identity/contrastive"] = contrast.detach()
        return settings.weight * away + settings.contrastive * contrast, values

    def _cut(self, latents: Tensor, square: Box) -> Tensor:
        pixels = (self.frozen.decode(latents, gradient=True) + 1.0) / 2.0
        return cut_squares(pixels, [square], self.recogniser.size, self.fill)
