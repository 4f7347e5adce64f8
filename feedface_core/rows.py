"""Which rows of a batch carry which face, and the sum of frozen block and control branch.

A sampler evaluates several predictions in one batch: rows without a face, rows with this face, rows with another. The
list of :class:`FaceRows` that describes them lives in Python, so no tensor is read back from the device, and rows
without a face never enter a branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from .adapter import FaceAdapter
from .blocks import FaceKV
from .config import COMBINATIONS


@dataclass(frozen=True, eq=False)
class Face:
    """One or several references of a person, encoded.

    Args:
        hidden: ``(N, T, E)`` hidden states of N references, T tokens each.
        weights: one non-negative weight for each reference; all ones when left out.
        combination: ``concat`` lets the branches attend to all references at once, a weight w biases the attention
            logits by log w; ``average`` averages the tokens; ``weighted_average`` does so by weight. A reference of
            weight 0 is left out in all three.
        encoder: fingerprint of the encoder that made the hidden states.
    """

    hidden: Tensor
    weights: tuple[float, ...] = ()
    combination: str = "concat"
    encoder: str = ""

    def __post_init__(self):
        if self.hidden.ndim != 3 or self.hidden.shape[0] == 0:
            raise ValueError(f"a face needs hidden states (references, tokens, width), got {tuple(self.hidden.shape)}")
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * self.hidden.shape[0])
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if len(self.weights) != self.hidden.shape[0]:
            raise ValueError(f"{len(self.weights)} weights for {self.hidden.shape[0]} references: give one for each")
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
            raise ValueError(f"weights of references must be finite and not negative, got {list(self.weights)}")
        if self.combination not in COMBINATIONS:
            raise ValueError(f"combination is {self.combination!r}, expected one of {', '.join(COMBINATIONS)}")

    @property
    def empty(self) -> bool:
        """True when every weight is zero: such a face is no face."""
        return not any(self.weights)

    def combined(self) -> tuple[Tensor, Tensor | None]:
        """Hidden states ``(1, L, E)`` and logit bias ``(1, 1, 1, L)``, the latter None when all weights are equal."""
        used = [index for index, weight in enumerate(self.weights) if weight > 0]
        if not used:
            raise ValueError("every reference has weight 0, so there is no face to combine")
        hidden, weights = self.hidden[used], [self.weights[index] for index in used]
        if self.combination == "concat":
            tokens = hidden.flatten(0, 1).unsqueeze(0)  # (1, N * T, E)
            if len(set(weights)) == 1:  # a common factor cancels in the softmax
                return tokens, None
            log_weights = torch.tensor(weights, dtype=torch.float32, device=hidden.device).log()
            return tokens, log_weights.repeat_interleave(hidden.shape[1]).view(1, 1, 1, -1)
        if self.combination == "average":
            weights = [1.0] * len(used)
        share = torch.tensor(weights, dtype=torch.float32, device=hidden.device)
        share = (share / share.sum()).to(hidden.dtype)
        return torch.einsum("n,nte->te", share, hidden).unsqueeze(0), None


class FaceContext:
    """A face as one adapter sees it: keys and values for each branch, computed once and kept while it lives.

    Give it either ``hidden`` states ``(B, L, E)``, projected on first use, or finished ``tokens``
    ``(B, L, context_width)``. B is 1 (the same face for every row) or the number of rows.
    """

    def __init__(self, adapter: FaceAdapter, hidden: Tensor | None = None, bias: Tensor | None = None,
                 tokens: Tensor | None = None):
        if (hidden is None) == (tokens is None):
            raise ValueError("give a FaceContext either hidden states or tokens")
        self.adapter = adapter
        self._hidden = hidden
        self._tokens = tokens
        self._bias = bias
        self._kv: dict[int, list[FaceKV]] = {}

    @classmethod
    def of(cls, adapter: FaceAdapter, face: Face) -> FaceContext:
        return cls(adapter, *face.combined())

    @classmethod
    def null(cls, adapter: FaceAdapter, device: torch.device, dtype: torch.dtype) -> FaceContext:
        """What a dropped face means to an adapter with a learned or encoded null."""
        return cls(adapter, tokens=adapter.null(device, dtype))

    def face_kv(self, index: int, like: Tensor) -> list[FaceKV]:
        """Keys and values of branch ``index`` on the device and in the dtype of ``like``."""
        kv = self._kv.get(index)
        if kv is None or kv[0][0].device != like.device or kv[0][0].dtype != like.dtype:
            if self._tokens is None or self._tokens.device != like.device or self._tokens.dtype != like.dtype:
                if self._hidden is not None:
                    self._tokens = self.adapter.project(self._hidden.to(like.device, like.dtype))
                else:
                    self._tokens = self._tokens.to(like.device, like.dtype)
            kv = self._kv[index] = self.adapter.branches[index].project_face(self._tokens)
        return kv

    def prepare(self, like: Tensor) -> None:
        """Projects for every branch now. Gradient checkpointing needs that: a block that is run again must find what
        its first run found.
        """
        for index in range(len(self.adapter.branches)):
            self.face_kv(index, like)

    def bias(self, like: Tensor) -> Tensor | None:
        return None if self._bias is None else self._bias.to(like.device, like.dtype)


@dataclass(frozen=True, eq=False)
class FaceRows:
    """Consecutive rows of a batch that are treated alike.

    Args:
        count: how many rows.
        context: their face, or None for no face.
        strength: factor on what the branches add.
        mask: ``(1 or count, H, W)`` in latent pixels, multiplied onto what the branches add.
    """

    count: int
    context: FaceContext | None = None
    strength: float = 1.0
    mask: Tensor | None = None
    _grids: dict = field(default_factory=dict, repr=False)

    @property
    def active(self) -> bool:
        return self.context is not None and self.strength != 0.0

    def token_mask(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """The mask averaged over the cells of a token grid (h, w): ``(1 or count, h * w, 1)``."""
        key = (grid, like.device, like.dtype)
        if key not in self._grids:
            mask = self.mask.to(like.device, torch.float32).unsqueeze(1)  # (m, 1, H, W)
            mask = functional.interpolate(mask, size=grid, mode="area")
            self._grids[key] = mask.flatten(1).unsqueeze(-1).to(like.dtype)
        return self._grids[key]


def _same_treatment(a: FaceRows, b: FaceRows) -> bool:
    per_row = b.context is not None and b.context is a.context and a.mask is None and b.mask is None
    return per_row and a.strength == b.strength


def merge_rows(rows: Sequence[FaceRows]) -> list[FaceRows]:
    """Joins neighbours with the same face, strength and no mask, so that a branch runs once for them."""
    merged: list[FaceRows] = []
    for entry in rows:
        if merged and _same_treatment(merged[-1], entry):
            merged[-1] = FaceRows(merged[-1].count + entry.count, entry.context, entry.strength)
        else:
            merged.append(entry)
    return merged


def add_control(index: int, block_input: Tensor, block_output: Tensor, rows: Sequence[FaceRows],
                grid: tuple[int, int] | None = None) -> Tensor:
    """``block_output + strength · mask · branch(tap)`` on the rows that carry a face; the others stay as they are.

    Args:
        index: which branch of the adapter.
        block_input, block_output: ``(B, S, width)`` going into and coming out of the frozen block. The image tokens
            are the last h·w of the S tokens; the branch sees only those.
        rows: descriptions of all B rows, in order.
        grid: (h, w) of the image tokens; None when all S tokens are image tokens and no mask is used.

    Returns:
        ``(B, S, width)``; the very tensor ``block_output`` when no row carries a face.

    Raises:
        ValueError: when the rows do not add up to B, or a mask is given without a grid.
    """
    if not any(entry.active for entry in rows):
        return block_output
    if sum(entry.count for entry in rows) != block_output.shape[0]:
        raise ValueError(f"the batch has {block_output.shape[0]} rows, but faces were described for "
                         f"{sum(entry.count for entry in rows)}")
    first = 0 if grid is None else block_output.shape[1] - grid[0] * grid[1]
    out = block_output.clone()
    start = 0
    for entry in merge_rows(rows):
        stop = start + entry.count
        if entry.active:
            adapter = entry.context.adapter
            source = block_input if adapter.config.tap == "input" else block_output
            x = source[start:stop, first:]  # (count, h * w, width)
            added = adapter.branches[index](x, entry.context.face_kv(index, x), entry.context.bias(x))
            if entry.mask is not None:
                if grid is None:
                    raise ValueError("a face mask needs the token grid of the site")
                added = added * entry.token_mask(grid, added)
            out[start:stop, first:].add_(added, alpha=entry.strength)
        start = stop
    return out
