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
from .errors import FeedFaceError, shorten
from .schedule import Schedule

KeysValues = tuple[Tensor, Tensor]
LARGEST_HIDDEN = 65504.0
"""What half precision holds."""


@dataclass(frozen=True, eq=False)
class Face:
    """One or several references of a person, encoded.

    Args:
        hidden: ``(N, T, E)`` hidden states of N references, T tokens each.
        weights: one for each reference, 0 or from 1e-30 to 1e6; all ones when left out.
        combination: see :func:`combine_references`.
        encoder: fingerprint of the encoder that made the hidden states.

    Raises:
        FeedFaceError: for hidden states of another shape or type or that half precision cannot hold, or another value.
    """

    hidden: Tensor
    weights: tuple[float, ...] = ()
    combination: str = "concat"
    encoder: str = ""

    def __post_init__(self):
        hidden = self.hidden
        if hidden.ndim != 3 or 0 in hidden.shape or not hidden.is_floating_point():
            expected = "floats (references, tokens, width)"
            raise FeedFaceError(f"hidden states of a face are {shorten(hidden)}, expected {expected}")
        if not (most := float(hidden.abs().max())) <= LARGEST_HIDDEN:  # a NaN is not
            raise FeedFaceError(f"hidden states of a face reach {most:g}, expected at most {LARGEST_HIDDEN:g}")
        weights = (1.0,) * len(hidden) if self.weights == () else self.weights
        usable = isinstance(weights, (tuple, list)) and all(
            isinstance(weight, (int, float)) and (weight == 0 or 1e-30 <= weight <= 1e6) for weight in weights
        )
        if not usable or len(weights) != len(hidden):
            expected = f"{len(hidden)} numbers, each 0 or from 1e-30 to 1e6"
            raise FeedFaceError(f"weights of the references are {shorten(weights)}, expected {expected}")
        object.__setattr__(self, "weights", tuple(map(float, weights)))
        if self.combination not in COMBINATIONS:
            found = shorten(self.combination)
            raise FeedFaceError(f"combination is {found}, expected one of {', '.join(COMBINATIONS)}")
        if not isinstance(self.encoder, str) or len(self.encoder) > 64:
            raise FeedFaceError(f"encoder is {shorten(self.encoder)}, expected a fingerprint")

    @property
    def empty(self) -> bool:
        """True when every weight is zero: such a face is no face."""
        return not any(self.weights)


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
class People:
    """Several faces in one picture, each in its own region: a token of the picture attends to the faces of its region
    only, in one pass of the branches however many they are.

    Args:
        faces: R of them, from one encoder.
        masks: ``(R, H, W)`` with values 0…1, in any resolution of the picture's shape. Where regions overlap, a token
            attends to all faces there, each with the weight of its mask.
        strengths: one for each face; all ones when left out.

    Raises:
        FeedFaceError: another number of masks or strengths than faces, or faces of different encoders.
    """

    faces: tuple[Face, ...]
    masks: Tensor
    strengths: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.strengths:
            object.__setattr__(self, "strengths", (1.0,) * len(self.faces))
        counts = (len(self.faces), len(self.masks), len(self.strengths))
        if self.masks.ndim != 3 or len(set(counts)) != 1 or 0 in (*counts, *self.masks.shape):
            raise FeedFaceError(
                f"{counts[0]} faces, {counts[1]} regions and {counts[2]} strengths: give one of each for a face"
            )
        if len({(face.encoder, face.hidden.shape[2]) for face in self.faces}) > 1:
            names = ", ".join(face.encoder or "unknown" for face in self.faces)
            raise FeedFaceError(f"the faces come from different encoders ({names}); encode all with the same adapter")
        for number, face in enumerate(self.faces, 1):
            if face.empty:
                raise FeedFaceError(f"face {number} of {len(self.faces)} has no reference with a weight above 0")

    @property
    def empty(self) -> bool:
        """True when no face acts anywhere."""
        return not any(strength and bool(mask.any()) for mask, strength in zip(self.masks, self.strengths, strict=True))


@dataclass(frozen=True, eq=False)
class FaceControl:
    """What a face does to rows of a batch, and when.

    Args:
        face: whose it is, or several people's; None for a dropped face, or for faces that have no name (training).
        strength: factor on what the branches add.
        mask: ``(1 or rows, H, W)`` with values 0…1, multiplied onto what the branches add; in any resolution of the
            picture's shape.
        start, end: share of the sampling run, 0…1, between which the branches act.
        schedule: factors on the strength over the run and the blocks, or None. As with ``start`` and ``end``, who
            samples applies it.
        kv: for each site and block of its branch, keys and values ``(F, L, heads · head_dim)``; F is 1 or the number of
            rows. They do not change over a run, so :meth:`FaceAdapter.control` computes them once, when the
            conditioning is made ready.
        bias: ``(F, 1, 1, L)`` added to the logits of the attention to the face, or None.
        regions: ``(R, h, w)`` where each of several people is; their tokens follow one another among the L, as many as
            ``lengths`` says.
        text_tokens: ``(F, N, C)`` that take the place of the text's last ones but ``text_offset``, for an adapter
            without branches.
        background: what the adapter's second stream has for these rows; in ComfyUI each stream has rows of its own.
    """

    face: Face | People | None = None
    strength: float = 1.0
    mask: Tensor | None = None
    start: float = 0.0
    end: float = 1.0
    schedule: Schedule | None = None
    kv: Sequence[Sequence[KeysValues]] = ()
    bias: Tensor | None = None
    regions: Tensor | None = None
    lengths: tuple[int, ...] = ()
    text_tokens: Tensor | None = None
    text_offset: int = 0
    background: FaceControl | None = None

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

    def at_latents(self, noise: Tensor) -> dict[str, Tensor | None]:
        """``mask`` and ``regions`` as ``(count, h, w)`` for latents ``(B, C, h, w)``.

        Raises:
            FeedFaceError: the shape or the number of masks does not fit the latents.
        """
        if self.mask is not None and len(self.mask) not in (1, noise.shape[0]):
            raise FeedFaceError(
                f"FeedFace: {len(self.mask)} face masks for a batch of {noise.shape[0]} pictures: give one or one each"
            )
        masks = {"mask": self.mask, "regions": self.face.masks if isinstance(self.face, People) else None}
        return {name: None if mask is None else latent_masks(mask, noise) for name, mask in masks.items()}

    def cropped(self, area: Sequence[int] | None) -> FaceControl:
        """The same with its masks cut to a conditioning's area (h, w, y, x) in latent pixels."""
        if area is None:
            return self
        height, width, top, left = area
        window = (slice(None), slice(top, top + height), slice(left, left + width))
        own = {"mask": self.mask, "regions": self.regions}
        return replace(self, **{name: None if mask is None else mask[window] for name, mask in own.items()})

    def at_tokens(self, grid: tuple[int, int] | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """At a site with tokens on a grid (h, w): the bias ``(F, 1, 1 or h·w, L)`` of the attention logits, and the
        weight ``(1 or rows, h·w, 1)`` of what a branch adds; None where there is none.

        Raises:
            FeedFaceError: there are masks and the grid is not known.
        """
        weight = None if self.mask is None else token_mask(self.mask, grid, like)
        if self.regions is None:
            return self.bias, weight
        masks = token_mask(self.regions, grid, like).squeeze(-1)  # (R, h·w)
        strengths = masks.new_tensor(self.face.strengths)
        # A token outside all regions may attend to anyone: its weight is 0, and a row of -inf would be NaN.
        logits = torch.where(masks.amax(0) > 0, masks.log(), 0.0).T  # (h·w, R)
        logits = logits.repeat_interleave(torch.tensor(self.lengths, device=logits.device), dim=1)[None, None]
        share = (strengths @ masks / masks.sum(0).clamp(min=1.0))[None, :, None]  # (1, h·w, 1)
        return logits if self.bias is None else logits + self.bias, share if weight is None else weight * share


def latent_masks(masks: Tensor, noise: Tensor) -> Tensor:
    """Masks ``(M, H, W)`` in any resolution of the picture's shape → ``(M, h, w)`` for latents ``(B, C, h, w)``.

    Raises:
        FeedFaceError: the shapes differ.
    """
    (height, width), (mask_height, mask_width) = noise.shape[-2:], masks.shape[-2:]
    # One latent pixel of rounding on either side is no reason to refuse.
    if abs(mask_width * height - mask_height * width) > max(mask_width, mask_height, width, height):
        raise FeedFaceError(
            f"FeedFace: the face mask is {mask_width} × {mask_height} pixels, but the picture being made has the "
            f"shape {width} × {height} (latent; {width * 8} × {height * 8} pixels). Make the mask at that size."
        )
    small = functional.interpolate(masks.unsqueeze(1).float(), size=(height, width), mode="area")
    return small.squeeze(1).to(noise.device)


def token_mask(mask: Tensor, grid: tuple[int, int] | None, like: Tensor) -> Tensor:
    """A mask ``(M, H, W)`` averaged over the cells of a token grid (h, w): ``(M, h·w, 1)``.

    Raises:
        FeedFaceError: the grid is not known.
    """
    if grid is None:
        raise FeedFaceError("a face mask needs the token grid of the site")
    mask = functional.interpolate(mask.to(like.device, torch.float32).unsqueeze(1), size=grid, mode="area")
    return mask.flatten(1).unsqueeze(-1).to(like.dtype)


Rows = Sequence[tuple[int, "FaceControl | None"]]
"""Consecutive rows of a batch: how many, and what acts on them."""


def of_stream(rows: Rows, stream: str) -> Rows:
    """The rows as one stream of an adapter sees them; None where it has nothing for them."""
    controls = (control and (control if stream == "face" else control.background) for _, control in rows)
    return [
        (count, control if control is not None and (control.kv or control.text_tokens is not None) else None)
        for (count, _), control in zip(rows, controls, strict=True)
    ]
