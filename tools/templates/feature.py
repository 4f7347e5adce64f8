"""What a template is about: a feature, with its note."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.templates.bases import Base
from tools.templates.graph import Graph

ALL, SMALL_AND_RELEASED = ("small", "released", "sd15"), ("small", "released")


@dataclass(frozen=True)
class Feature:
    """One thing that the nodes do.

    Args:
        key: for file names.
        title: of the tile.
        build: adds the nodes.
        note: Markdown, for all bases.
        columns: headings.
        bases: names of the bases that it is shown on.
        kind: of the adapter: empty, ``face0``, ``mixer``.
        pictures: how many it saves.
    """

    key: str
    title: str
    build: Callable[[Graph, Base], None]
    note: str
    columns: tuple[str, ...]
    bases: tuple[str, ...] = SMALL_AND_RELEASED
    kind: str = ""
    pictures: int = 1
