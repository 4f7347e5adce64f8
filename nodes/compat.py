"""What differs between the versions of ComfyUI that the nodes run on (0.3.75 and newer), in one place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

CATEGORY = "FeedFace"
_SCHEMA_FIELDS = frozenset(field.name for field in dataclasses.fields(io.Schema))
_OPTIONAL_FIELDS = frozenset({"search_aliases"})


def make_schema(**fields: Any) -> io.Schema:
    """``io.Schema`` in the category of the pack, without the fields that this ComfyUI does not know yet.

    ComfyUI 0.3.75 has no ``search_aliases``. Any other unknown field stays an error.
    """
    unknown = _OPTIONAL_FIELDS - _SCHEMA_FIELDS
    known = {name: value for name, value in fields.items() if name not in unknown}
    return io.Schema(**{"category": CATEGORY} | known)


def model_folders(name: str) -> list[Path]:
    """Folders for one kind of model: those registered, by other packs or ``extra_model_paths.yaml``, then
    ``models/<name>``.

    Nothing is created.
    """
    registered = folder_paths.folder_names_and_paths.get(name, ((), ()))[0]
    folders = [Path(folder) for folder in registered] + [Path(folder_paths.models_dir) / name]
    return list(dict.fromkeys(folders))
