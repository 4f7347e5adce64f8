"""A site: one transformer block of a host, and how its tokens are read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..conditioning import Rows, add_control
from ..config import SiteConfig
from ..modules.adapter import FaceAdapter

#: Key of a block's ``transformer_options`` for (h, w) of its image tokens, where the sequence holds others too.
GRID_KEY = "picture_grid"


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
    ) -> Any:
        """What the block returned, with a branch of an adapter added on the rows that carry a face.

        Args:
            adapter, index: whose branch, and which.
            args, kwargs: of the block's call.
            returned: by the block.
            rows: see :func:`~feedface_core.conditioning.add_control`.
        """
        out = self.stream.result(returned)
        added = add_control(adapter, index, self.stream.read(args, kwargs), out, rows, token_grid(kwargs))
        return returned if added is out else self.stream.replace(returned, added)


def token_grid(kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(h, w) of the image tokens at the block being run: the U-ViT says it, ComfyUI's spatial transformers do too; None
    where nobody does, as in diffusers, whose blocks see nothing but image tokens."""
    options = kwargs.get("transformer_options") or {}
    grid = options.get(GRID_KEY) or options.get("activations_shape", ())[-2:]
    return (int(grid[0]), int(grid[1])) if grid else None
