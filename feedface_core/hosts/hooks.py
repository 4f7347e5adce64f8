"""Control branches on a live host through forward hooks, for training and for pipelines outside ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..conditioning import Rows, of_stream
from ..modules.adapter import FaceAdapter
from . import match_sites
from .site import Site


class BranchHooks:
    """An adapter's branches on the blocks of a host.

    Example::

        hooks = BranchHooks(unet, adapter)
        with hooks.faces([(4, None), (4, adapter.control(adapter.project(hidden)))]):
            prediction = unet(noisy, timesteps, text_states).sample
        hooks.remove()

    Args:
        model: the host.
        adapter: made for it.

    Raises:
        FeedFaceError: the adapter was made for another model.
    """

    def __init__(self, model: nn.Module, adapter: FaceAdapter):
        self.adapter = adapter
        self._rows: dict[str, Rows] = {}
        self._handles = [
            model.get_submodule(site.path).register_forward_hook(self._hook(stream, index, site), with_kwargs=True)
            for stream in adapter.streams
            for index, site in enumerate(match_sites(stream.config, model))
        ]

    def _hook(self, adapter: FaceAdapter, index: int, site: Site):
        def hook(block: nn.Module, args: tuple, kwargs: dict, returned: Any) -> Any:
            rows = self._rows.get(adapter.config.stream)
            return site.add_control(adapter, index, args, kwargs, returned, rows) if rows else returned

        return hook

    @contextmanager
    def faces(self, rows: Rows) -> Iterator[None]:
        """Within it, the host's forward passes treat the rows of their batch as described.

        With gradient checkpointing the backward pass runs blocks again, so it belongs inside as well.
        """
        own = {stream.config.stream: of_stream(rows, stream.config.stream) for stream in self.adapter.streams}
        previous, self._rows = self._rows, own if rows else {}
        try:
            yield
        finally:
            self._rows = previous

    def remove(self) -> None:
        """Leaves the host as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
