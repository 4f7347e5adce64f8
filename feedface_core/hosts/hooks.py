"""Control branches on a live host through forward hooks, for training and for pipelines outside ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..conditioning import Rows
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
        self._rows: Rows = ()
        self._handles = [
            model.get_submodule(site.path).register_forward_hook(self._hook(index, site), with_kwargs=True)
            for index, site in enumerate(match_sites(adapter.config, model))
        ]

    def _hook(self, index: int, site: Site):
        def hook(block: nn.Module, args: tuple, kwargs: dict, returned: Any) -> Any:
            if not self._rows:
                return returned
            return site.add_control(self.adapter, index, args, kwargs, returned, self._rows)

        return hook

    @contextmanager
    def faces(self, rows: Rows) -> Iterator[None]:
        """Within it, the host's forward passes treat the rows of their batch as described.

        With gradient checkpointing the backward pass runs blocks again, so it belongs inside as well.
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
