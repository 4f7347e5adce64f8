"""A site: one transformer block of a host, and how its tokens are read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..conditioning import FaceControl, Rows
from ..config import SiteConfig
from ..errors import FeedFaceError
from ..modules.adapter import FaceAdapter
from ..modules.uvit import GRID_KEY


@dataclass(frozen=True)
class Stream:
    """Where a block has the tokens of the picture: the last h·w of one tensor ``(B, S, C)``.

    Args:
        argument: position or name of that tensor among the block's arguments.
        output: its position in the tuple that the block returns; None when the block returns that tensor alone.
    """

    argument: int | str = 0
    output: int | None = None

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The tokens going into the block."""
        return args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]

    def result(self, returned: Any) -> Tensor:
        """The tokens coming out of the block."""
        return returned if self.output is None else returned[self.output]

    def replace(self, returned: Any, tokens: Tensor) -> Any:
        """What the block returned, with other tokens."""
        if self.output is None:
            return tokens
        return (*returned[: self.output], tokens, *returned[self.output + 1 :])


@dataclass(frozen=True)
class Site:
    """A transformer block of a host.

    Args:
        name: canonical name, the same for every implementation of the host.
        path: path of the block below the host module at hand.
        width, heads, head_dim: of the frozen block.
        stream: where its image tokens are.
    """

    name: str
    path: str
    width: int
    heads: int
    head_dim: int
    stream: Stream = Stream()

    def config(self) -> SiteConfig:
        return SiteConfig(self.name, self.width, self.heads, self.head_dim)

    def add_control(
        self,
        adapter: FaceAdapter,
        index: int,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        returned: Any,
        rows: Rows,
        scale: float = 1.0,
        factor: Tensor | None = None,
    ) -> Any:
        """What the block returned, with a branch of an adapter added on the rows that carry a face.

        Args:
            adapter, index: whose branch, and which.
            args, kwargs: of the block's call.
            returned: by the block.
            rows, scale, factor: see :func:`add_control`.
        """
        out = self.stream.result(returned)
        source, grid = self.stream.read(args, kwargs), token_grid(kwargs)
        added = add_control(adapter, index, source, out, rows, grid, scale, factor)
        return returned if added is out else self.stream.replace(returned, added)


def token_grid(kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(h, w) of the image tokens at the block being run: the U-ViT says it, ComfyUI's spatial transformers do too; None
    where nobody does, as in diffusers, whose blocks see nothing but image tokens."""
    options = kwargs.get("transformer_options") or {}
    grid = options.get(GRID_KEY) or options.get("activations_shape", ())[-2:]
    return (int(grid[0]), int(grid[1])) if grid else None


def merge_rows(rows: Rows) -> list[tuple[int, FaceControl | None]]:
    """Joins neighbours with one control, so that a branch runs once for them."""
    merged: list[tuple[int, FaceControl | None]] = []
    for count, control in rows:
        shared = control is None or ((control.mask is None or len(control.mask) == 1) and len(control.kv[0][0][0]) == 1)
        if merged and shared and merged[-1][1] is control:
            merged[-1] = (merged[-1][0] + count, control)
        else:
            merged.append((count, control))
    return merged


def add_control(
    adapter: FaceAdapter,
    index: int,
    block_input: Tensor,
    block_output: Tensor,
    rows: Rows,
    grid: tuple[int, int] | None = None,
    scale: float = 1.0,
    factor: Tensor | None = None,
) -> Tensor:
    """``block_output + strength · scale · factor · mask · branch(tap)`` on the rows that carry a face; the others stay
    as they are.

    Args:
        adapter: whose branch is added.
        index: which branch of the adapter.
        block_input, block_output: ``(B, S, width)`` going into and coming out of the frozen block. The image tokens
            are the last h·w of the S tokens; the branch sees only those.
        rows: descriptions of all B rows, in order.
        grid: (h, w) of the image tokens; None when all S tokens are image tokens and no mask is used.
        scale: of this site.
        factor: ``()`` of this step, or None; a tensor, since a compiler makes a new graph for every other number.

    Returns:
        ``(B, S, width)``; the very tensor ``block_output`` when no row carries a face.

    Raises:
        FeedFaceError: when the rows do not add up to B, or a mask is given without a grid.
    """
    if scale == 0.0 or all(control is None or control.strength == 0.0 for _, control in rows):
        return block_output
    if sum(count for count, _ in rows) != block_output.shape[0]:
        raise FeedFaceError(
            f"the batch has {block_output.shape[0]} rows, but faces were described for "
            f"{sum(count for count, _ in rows)}"
        )
    first = 0 if grid is None else block_output.shape[1] - grid[0] * grid[1]
    source = block_input if adapter.config.tap == "input" else block_output
    out = block_output.clone()
    start = 0
    for count, control in merge_rows(rows):
        stop = start + count
        if control is not None and control.strength != 0.0:
            x = source[start:stop, first:]  # (count, h·w, width)
            bias, weight = control.at_tokens(grid, x)
            added = adapter.branches[index](x, control.kv[index], bias)
            added = added if weight is None else added * weight
            added = added if factor is None else added * factor
            out[start:stop, first:].add_(added, alpha=control.strength * scale)
        start = stop
    return out
