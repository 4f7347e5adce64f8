"""Licences that an adapter file states, and where a model says its own."""

from __future__ import annotations

import re
from pathlib import Path

from feedface_core.files.json_file import regular_file

from .fields import Text
from .settings import Section

_KEY = re.compile(r"^license:\s*[\"']?([^\"'\n]+?)[\"']?\s*$", re.MULTILINE)
_HEAD = 20_000  # characters of a model card in which the fields stand


class LicenceSettings(Section):
    """Licences, as SPDX identifiers or in a few words, for the adapter's metadata."""

    adapter: Text = ""
    """Of the adapter that comes out."""
    base: Text = ""
    """Of the base model; empty takes what its model card or its metadata say."""
    encoder: Text = ""
    """Of the face encoder; empty takes what its model card says."""


def stated_licence(model: str) -> str:
    """The licence that a model states: ``license`` on the card (``README.md``) of a folder, or beside a file, or
    ``modelspec.license`` in the metadata of a safetensors file. Empty where there is none."""
    path = Path(model).expanduser()
    try:
        if path.suffix == ".safetensors" and path.is_file():
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                if stated := (file.metadata() or {}).get("modelspec.license"):
                    return stated.strip()
        regular_file(beside := (path if path.is_dir() else path.parent) / "README.md")
        with open(beside, encoding="utf-8", errors="replace") as card:
            head = card.read(_HEAD)
    except Exception:  # no such file, or one that is none: the training itself says so
        return ""
    fields = head.split("\n---", 1)[0] if head.startswith("---") else ""
    return found[1] if (found := _KEY.search(fields)) else ""
