"""What every base has in common: an adapter's branches beside the blocks of its host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from feedface_core.hosts.hooks import BranchHooks
from feedface_core.modules.adapter import FaceAdapter

from .frozen_model import BaseError


class Attached:
    """Attaches an adapter to ``self.host``, and gives it the faces of each forward pass."""

    host: nn.Module
    _hooks: BranchHooks | None = None
    _rows: Any = None

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it, predictions are those of sampling; for most hosts there is no difference."""
        yield

    def attach(self, adapter: FaceAdapter) -> None:
        """Put the adapter's branches beside the blocks. Raises ``ValueError`` when it was made for another base."""
        self.detach()
        self._hooks = BranchHooks(self.host, adapter)

    def detach(self) -> None:
        """Take the branches away again."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    @contextmanager
    def _faces(self, rows: Any) -> Iterator[None]:
        if rows is None:
            yield
            return
        if self._hooks is None:
            raise BaseError("faces were given, but no adapter is attached")
        previous, self._rows = self._rows, rows
        try:
            with self._hooks.faces(rows):
                yield
        finally:
            self._rows = previous
