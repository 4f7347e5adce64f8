"""Control branches on a live host through forward hooks, for training and for pipelines outside ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..adapter import FaceAdapter
from ..rows import FaceRows, add_control
from . import Site, match_sites

#: Key of a block's ``transformer_options`` for (h, w) of its image tokens, where the sequence holds others too.
GRID_KEY = "picture_grid"


class Attachment:
    """An adapter's branches on a host's blocks.

    Example::

        attachment = attach(unet, adapter)
        with attachment.faces([FaceRows(4), FaceRows(4, FaceContext(adapter, hidden))]):
            prediction = unet(noisy, timesteps, text_states).sample
        attachment.remove()
    """

    def __init__(self, model: nn.Module, adapter: FaceAdapter, sites: Sequence[Site]):
        self.adapter = adapter
        self._rows: Sequence[FaceRows] = ()
        modules = dict(model.named_modules())
        self._handles = [modules[site.path].register_forward_hook(self._hook(index), with_kwargs=True)
                         for index, site in enumerate(sites)]

    def _hook(self, index: int):
        def hook(block: nn.Module, inputs: tuple[Tensor, ...], named: dict, output: Tensor) -> Tensor:
            if not self._rows:
                return output
            grid = (named.get("transformer_options") or {}).get(GRID_KEY)
            return add_control(index, inputs[0], output, self._rows, grid)

        return hook

    @contextmanager
    def faces(self, rows: Sequence[FaceRows]) -> Iterator[None]:
        """Within it, the host's forward passes treat the rows of their batch as described.

        With gradient checkpointing the backward pass runs blocks again, so it belongs inside as well, and the faces
        must be prepared (:meth:`~feedface_core.rows.FaceContext.prepare`) before.
        """
        previous, self._rows = self._rows, tuple(rows)
        try:
            yield
        finally:
            self._rows = previous

    def remove(self) -> None:
        """Leaves the host as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def attach(model: nn.Module, adapter: FaceAdapter) -> Attachment:
    """Hooks the adapter's branches onto a host. Raises ``ValueError`` when it was made for another model."""
    return Attachment(model, adapter, match_sites(adapter.config, model))
