"""The model folders of this pack: ``models/feedface`` and ``models/feedface/faces``.

Paths of ``extra_model_paths.yaml`` under the key ``feedface`` come in on their own; each may have a folder ``faces``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import folder_paths

from ..feedface_core.errors import FeedFaceError

ADAPTERS = "feedface"
FACES = "feedface_faces"
SMALL_MODEL = Path(__file__).resolve().parents[1] / "models" / "feedface_small"  # comes with the pack
OWN_ADAPTERS = SMALL_MODEL / "adapter"
NOTHING = "nothing in models/"
#: What no file system or no other system takes in a name: control signs, and what Windows reserves.
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff<>:"|?*\\]')


def register() -> None:
    """Makes the folders known to ComfyUI. Creates none on disk."""
    folder_paths.add_model_folder_path(ADAPTERS, os.path.join(folder_paths.models_dir, ADAPTERS))
    for path in folder_paths.get_folder_paths(ADAPTERS):
        folder_paths.add_model_folder_path(FACES, os.path.join(path, "faces"))
    if OWN_ADAPTERS.is_dir():
        folder_paths.add_model_folder_path(ADAPTERS, str(OWN_ADAPTERS))
    for name, extensions in ((ADAPTERS, {".safetensors", ".pt", ".pth"}), (FACES, {".safetensors"})):
        folder_paths.folder_names_and_paths[name] = (folder_paths.get_folder_paths(name), extensions)


def choices(folder: str, empty: str | None = None) -> list[str]:
    """The files of a model folder for a list on a node, or one entry that says which folder of ``models`` is empty: the
    frontend shows an empty list as "undefined". Faces saved below the adapters' folder are not adapters."""
    names = folder_paths.get_filename_list(folder)
    if folder == ADAPTERS:
        names = [name for name in names if Path(name).parts[0] != "faces"]
    return names or [NOTHING + (empty or folder)]


def find(folder: str, name: str) -> str:
    """The full path of a file by its name in the list.

    Raises:
        FileNotFoundError: names the folders that were searched.
    """
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(folder))
        missing = "nothing to choose from" if name.startswith(NOTHING) else f"no file {name!r}"
        raise FileNotFoundError(f"FeedFace: {missing}; looked in {searched}. Put the file there and refresh (key R).")
    return path


def found(folder: str, name: str) -> bool | str:
    """What ``validate_inputs`` answers: True, or what :func:`find` says of a missing file."""
    try:
        find(folder, name)
    except FileNotFoundError as error:
        return str(error)
    return True


def state(folder: str, names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of files, which tell when one was replaced; missing files are left out."""
    paths = {name: folder_paths.get_full_path(folder, name) for name in names}
    found = {name: os.stat(path) for name, path in paths.items() if path}
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(found.items())]


def model_folders(name: str) -> list[Path]:
    """Folders for one kind of model: those registered, by other packs or ``extra_model_paths.yaml``, then
    ``models/<name>``. Nothing is created."""
    registered = folder_paths.folder_names_and_paths.get(name, ((), ()))[0]
    folders = [Path(folder) for folder in registered] + [Path(folder_paths.models_dir) / name]
    return list(dict.fromkeys(folders))


def face_path(name: str) -> Path:
    """Where a face of this name is saved: in the first faces folder, never outside it.

    Raises:
        FeedFaceError: an empty name, one that leads out of the folder, or one that cannot be a file's.
    """
    folder = Path(folder_paths.get_folder_paths(FACES)[0]).resolve()
    parts = name.strip().removesuffix(".safetensors").split("/")
    usable = all(part.strip(". ") and len(part.encode("utf-8", "replace")) <= 200 for part in parts)
    path = folder.joinpath(*parts[:-1], f"{parts[-1]}.safetensors") if usable else folder
    if _FORBIDDEN.search(name) or folder not in path.resolve().parents:
        raise FeedFaceError(
            f"FeedFace Save Face: {name[:80]!r} is not a usable file name; use letters, digits, sub-folders."
        )
    if path.is_dir():
        raise FeedFaceError(f"FeedFace Save Face: {path} is a folder; choose another name.")
    return path
