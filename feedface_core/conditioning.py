"""What a prediction is conditioned on beside its text: a face, and what it does to rows of a batch.

A sampler evaluates several predictions in one batch: rows without a face, rows with this face, rows with another. Which
rows carry what is a Python list of ``(number of rows, FaceControl or None)``, so no tensor is read back from the
device, and rows without a face never enter a branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from .config import COMBINATIONS
from .errors import FeedFaceError

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Face:
    """One or several references of a person, encoded.

    Args:
        hidden: ``(N, T, E)`` hidden states of N references, T tokens each.
        weights: one non-negative weight for each reference; all ones when left out.
        combination: see :func:`combine_references`.
        encoder: fingerprint of the encoder that made the hidden states.
    """

    hidden: Tensor
    weights: tuple[float, ...] = ()
    combination: str = "concat"
    encoder: str = ""

    def __post_init__(self):
        if self.hidden.ndim != 3 or self.hidden.shape[0] == 0:
            raise FeedFaceError(f"a face needs hidden states (references, tokens, width), got {(*self.hidden.shape,)}")
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * self.hidden.shape[0])
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if len(self.weights) != self.hidden.shape[0]:
            raise FeedFaceError(f"{len(self.weights)} weights for {self.hidden.shape[0]} references: give one for each")
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
            raise FeedFaceError(f"weights of references must be finite and not negative, got {list(self.weights)}")
        if self.combination not in COMBINATIONS:
            raise FeedFaceError(f"combination is {self.combination!r}, expected one of {', '.join(COMBINATIONS)}")

    @property
    def empty(self) -> bool:
        """True when every weight is zero: such a face is no face."""
        return not any(self.weights)


def mix_faces(first: Face, second: Face, share: float, combination: str) -> Face:
    """The references of two faces as one face, the second with ``share`` (0…1) of the weight.

    Raises:
        FeedFaceError: the faces come from different encoders.
    """
    if first.encoder != second.encoder or first.hidden.shape[1:] != second.hidden.shape[1:]:
        raise FeedFaceError(
            f"face A comes from encoder {first.encoder or 'unknown'}, face B from "
            f"{second.encoder or 'unknown'}; encode both with the same adapter"
        )
    if combination == "average":  # the mean within each face; between them the share decides
        combination, own = "weighted_average", [[float(w > 0) for w in face.weights] for face in (first, second)]
    else:
        own = [face.weights for face in (first, second)]
    weights = [
        part * weight / (sum(face) or 1.0)
        for face, part in zip(own, (1.0 - share, share), strict=True)
        for weight in face
    ]
    return Face(torch.cat([first.hidden, second.hidden]), tuple(weights), combination, first.encoder)


def combine_references(
    hidden: Tensor, counts: Sequence[int], combination: str = "concat", weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The references of F faces as one token sequence for each face.

    Args:
        hidden: ``(R, T, E)`` hidden states of all references in the order of the faces.
        counts: references of each of the F faces, R in all.
        combination: ``concat`` lets the branches attend to all references of a face at once; a weight w biases the
            attention logits by log w. ``average`` averages the tokens, ``weighted_average`` does so by weight. A
            reference of weight 0 is left out in all three.
        weights: one for each reference; None for equal ones.

    Returns:
        ``(F, L, E)``, and the bias ``(F, 1, 1, L)`` of the attention logits, which also hides padding; None when there
        is nothing to bias.

    Raises:
        FeedFaceError: for a face without a reference.
    """
    weight = torch.ones(hidden.shape[0]) if weights is None else torch.tensor(list(weights), dtype=torch.float32)
    used = [own.nonzero().flatten() for own in weight.split(list(counts))]
    if not all(len(own) for own in used):
        raise FeedFaceError("every reference has weight 0, so there is no face to combine")
    faces = [face[own.to(face.device)] for face, own in zip(hidden.split(list(counts)), used, strict=True)]
    shares = [own[kept] for own, kept in zip(weight.split(list(counts)), used, strict=True)]  # F × (n,)
    if combination != "concat":
        if combination == "average":
            shares = [torch.ones_like(share) for share in shares]
        means = [
            torch.einsum("n,nte->te", (share / share.sum()).to(face), face)
            for share, face in zip(shares, faces, strict=True)
        ]
        return torch.stack(means), None
    tokens = pad_sequence([face.flatten(0, 1) for face in faces], batch_first=True)  # (F, L, E)
    # A factor that all references of a face have in common cancels in the softmax.
    logs = [(share / share[0]).log().repeat_interleave(hidden.shape[1]) for share in shares]
    bias = pad_sequence(logs, batch_first=True, padding_value=-math.inf)  # (F, L)
    return tokens, bias[:, None, None, :].to(hidden.device) if bias.any() else None


@dataclass(frozen=True, eq=False)
class FaceControl:
    """What a face does to rows of a batch, and when.

    Args:
        face: whose it is; None for a dropped face, or for faces that have no name (training).
        strength: factor on what the branches add.
        mask: ``(1 or rows, H, W)`` with values 0…1, multiplied onto what the branches add; in any resolution of the
            picture's shape.
        start, end: share of the sampling run, 0…1, between which the branches act.
        kv: for each site and block of its branch, keys and values ``(F, L, heads · head_dim)``; F is 1 or the number of
            rows. They do not change over a run, so :meth:`FaceAdapter.control` computes them once, when the
            conditioning is made ready.
        bias: ``(F, 1, 1, L)`` added to the logits of the attention to the face, or None.
    """

    face: Face | None = None
    strength: float = 1.0
    mask: Tensor | None = None
    start: float = 0.0
    end: float = 1.0
    kv: Sequence[Sequence[KeysValues]] = ()
    bias: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether it describes a face that acts anywhere; asked of a face before its keys and values are made."""
        return (
            self.face is not None
            and not self.face.empty
            and self.strength != 0.0
            and self.start < self.end
            and (self.mask is None or bool(self.mask.any()))
        )

    def latent_mask(self, noise: Tensor) -> Tensor | None:
        """The mask, in any resolution of the picture's shape, as ``(1 or B, h, w)`` for latents ``(B, C, h, w)``.

        Raises:
            FeedFaceError: the shape or the number of masks does not fit the latents.
        """
        if self.mask is None:
            return None
        height, width = noise.shape[-2:]
        count, mask_height, mask_width = self.mask.shape
        # One latent pixel of rounding on either side is no reason to refuse.
        if abs(mask_width * height - mask_height * width) > max(mask_width, mask_height, width, height):
            raise FeedFaceError(
                f"FeedFace: the face mask is {mask_width} × {mask_height} pixels, but the picture being made has the "
                f"shape {width} × {height} (latent; {width * 8} × {height * 8} pixels). Make the mask at that size."
            )
        if count not in (1, noise.shape[0]):
            raise FeedFaceError(
                f"FeedFace: {count} face masks for a batch of {noise.shape[0]} pictures; give one, or one each."
            )
        mask = functional.interpolate(self.mask.unsqueeze(1).float(), size=(height, width), mode="area")
        return mask.squeeze(1).to(noise.device)

    def cropped(self, area: Sequence[int] | None) -> FaceControl:
        """The same with its mask cut to a conditioning's area (h, w, y, x) in latent pixels."""
        if self.mask is None or area is None:
            return self
        height, width, top, left = area
        return replace(self, mask=self.mask[:, top : top + height, left : left + width])


Rows = Sequence[tuple[int, "FaceControl | None"]]
"""Consecutive rows of a batch: how many, and what acts on them."""
