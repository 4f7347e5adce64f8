"""Control branches on a live host through forward hooks, for training and for pipelines outside ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..conditioning import Rows, of_stream
from ..errors import FeedFaceError
from ..modules.adapter import FaceAdapter
from ..modules.uvit import GRID_KEY
from . import match_sites
from .site import Site, token_grid


def latent_size(rows: Rows) -> tuple[int, int] | None:
    """(h, w) of the latents, which masks and regions have; None where no control has any."""
    controls = [control for _, control in rows if control is not None]
    masks = [mask for control in controls for mask in (control.regions, control.mask) if mask is not None]
    return (masks[0].shape[-2], masks[0].shape[-1]) if masks else None


def grid_at(latent: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The grid (h, w) of so many tokens in a U-Net that halves latents (h, w) from level to level, rounding up.

    Raises:
        FeedFaceError: no level has so many tokens.
    """
    height, width = latent
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise FeedFaceError(f"{tokens} tokens are no level of a U-Net with latents of {latent[1]} × {latent[0]}")
    return height, width


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
        self._latent: tuple[int, int] | None = None
        self._handles = [
            model.get_submodule(site.path).register_forward_hook(self._hook(stream, index, site), with_kwargs=True)
            for stream in adapter.streams
            for index, site in enumerate(match_sites(stream.config, model))
        ]

    def _hook(self, adapter: FaceAdapter, index: int, site: Site):
        def hook(block: nn.Module, args: tuple, kwargs: dict, returned: Any) -> Any:
            rows = self._rows.get(adapter.config.stream)
            if not rows:
                return returned
            if self._latent is not None and token_grid(kwargs) is None:  # a U-Net's blocks do not know
                grid = grid_at(self._latent, site.stream.result(returned).shape[1])
                kwargs = {**kwargs, "transformer_options": {GRID_KEY: grid}}
            return site.add_control(adapter, index, args, kwargs, returned, rows)

        return hook

    @contextmanager
    def faces(self, rows: Rows) -> Iterator[None]:
        """Within it, the host's forward passes treat the rows of their batch as described.

        With gradient checkpointing the backward pass runs blocks again, so it belongs inside as well.
        """
        own = {stream.config.stream: of_stream(rows, stream.config.stream) for stream in self.adapter.streams}
        previous = self._rows, self._latent
        self._rows, self._latent = (own, latent_size(rows)) if rows else ({}, None)
        try:
            yield
        finally:
            self._rows, self._latent = previous

    def remove(self) -> None:
        """Leaves the host as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
