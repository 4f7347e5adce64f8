"""The model folders of this pack: ``models/feedface`` and ``models/feedface/faces``.

Paths of ``extra_model_paths.yaml`` under the key ``feedface`` come in on their own; each may have a folder ``faces``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import folder_paths

ADAPTERS = "feedface"
FACES = "feedface_faces"
SMALL_MODEL = Path(__file__).resolve().parents[1] / "models" / "feedface_small"  # comes with the pack
OWN_ADAPTERS = SMALL_MODEL / "adapter"
EXTENSIONS = {".safetensors", ".pt", ".pth"}
_NOTHING = "nothing in models/"


def register() -> None:
    """Makes the folders known to ComfyUI. Creates none on disk."""
    folder_paths.add_model_folder_path(ADAPTERS, os.path.join(folder_paths.models_dir, ADAPTERS))
    for path in folder_paths.get_folder_paths(ADAPTERS):
        folder_paths.add_model_folder_path(FACES, os.path.join(path, "faces"))
    if OWN_ADAPTERS.is_dir():
        folder_paths.add_model_folder_path(ADAPTERS, str(OWN_ADAPTERS))
    _set_extensions(ADAPTERS, EXTENSIONS)
    _set_extensions(FACES, {".safetensors"})


def _set_extensions(name: str, extensions: set[str]) -> None:
    paths, _ = folder_paths.folder_names_and_paths[name]
    folder_paths.folder_names_and_paths[name] = (paths, extensions)


def choices(names: list[str], folder: str) -> list[str]:
    """The names for a list on a node, or one entry that says which folder of ``models`` is empty.

    The frontend shows an empty list as "undefined".
    """
    return names or [_NOTHING + folder]


def describe_missing(name: str) -> str:
    return "nothing to choose from" if name.startswith(_NOTHING) else f"no file {name!r}"


def adapter_files() -> list[str]:
    """Names for the adapter list; faces saved in the folder below are not adapters."""
    return [name for name in folder_paths.get_filename_list(ADAPTERS) if Path(name).parts[0] != "faces"]


def face_files() -> list[str]:
    return folder_paths.get_filename_list(FACES)


def find(folder: str, name: str) -> str:
    """The full path of a file by its name in the list.

    Raises:
        FileNotFoundError: names the folders that were searched.
    """
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(
            f"FeedFace: {describe_missing(name)}; looked in {searched}. Put the file there and refresh (key R)."
        )
    return path


def state(folder: str, names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of files, which tell when one was replaced; missing files are left out."""
    paths = {name: folder_paths.get_full_path(folder, name) for name in names}
    found = {name: os.stat(path) for name, path in paths.items() if path}
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(found.items())]


def face_path(name: str) -> Path:
    """Where a face of this name is saved: in the first faces folder, never outside it.

    Raises:
        ValueError: an empty name, or one that leads out of the folder.
    """
    folder = Path(folder_paths.get_folder_paths(FACES)[0]).resolve()
    name = name.strip().removesuffix(".safetensors")
    path = (folder / f"{name}.safetensors").resolve()
    if not name or folder not in path.parents:
        raise ValueError(f"FeedFace Save Face: {name!r} is not a usable file name; use letters, digits, sub-folders.")
    return path
