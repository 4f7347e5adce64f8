"""Saved faces that are broken in one place each, and faces that must not be saved."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from support.refused import refused

from feedface_core.conditioning import Face
from feedface_core.files.face_file import load_face, save_face

NAN, INF = float("nan"), float("inf")


def write(path: Path, hidden: torch.Tensor | None = None, **changes: str | None) -> Path:
    """A saved face of two references with some of its metadata changed; None leaves a key out."""
    metadata = {
        "format": "feedface-face",
        "format_version": "1",
        "encoder": "abc",
        "combination": "concat",
        "weights": "[1.0, 0.5]",
        **changes,
    }
    hidden = torch.ones(2, 5, 8) if hidden is None else hidden
    save_file({"face.hidden": hidden}, path, {key: text for key, text in metadata.items() if text is not None})
    return path


WEIGHTS = [
    "5", "null", "[[1]]", '["a"]', "[-1, 1]", "[NaN, 1]", "[Infinity, 1]", "[1]", "[1, 1, 1]", "{}", "", "[", "[1, 1",
    "[null, 1]", '"1, 1"', "[true, false, true]", "[1e400, 1]", "[" * 50_000 + "]" * 50_000, "[1e308, 1e308]", "text",
    "[0, 1e39]", '[{"a": 1}, 1]', "[1, 1]x", "[" + "9" * 5000 + ", 1]", "[]", "[1e-320, 1]",
    "[1e7, 1]", '["1", "1"]',
]  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda text: text[:20])
def test_weights(tmp_path: Path, weights: str) -> None:
    path = write(tmp_path / "face.safetensors", weights=weights)
    refused(lambda: load_face(path), path, "weights")


METADATA = [
    ("format", None), ("format", ""), ("format", "feedface-adapter"), ("format_version", None), ("format_version", ""),
    ("format_version", "99"), ("format_version", "one"), ("combination", None), ("combination", ""),
    ("combination", "bogus"), ("combination", "sum"), ("weights", None), ("encoder", None),
    ("encoder", "x" * 10**6), ("combination", "x" * 10**6),
    ("format", "x" * 10**6), ("format_version", "x" * 10**6), ("weights", "x" * 10**6),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text"), METADATA)
def test_metadata(tmp_path: Path, key: str, text: str | None) -> None:
    path = write(tmp_path / "face.safetensors", **{key: text})
    refused(lambda: load_face(path), path)


HIDDEN = {
    "flat": torch.ones(2, 8),
    "no dimension": torch.tensor(1.0),
    "four dimensions": torch.ones(2, 5, 8, 1),
    "no references": torch.ones(0, 5, 8),
    "no tokens": torch.ones(2, 0, 8),
    "no width": torch.ones(2, 5, 0),
    "NaN": torch.full((2, 5, 8), NAN),
    "one NaN": torch.ones(2, 5, 8).index_fill(2, torch.tensor([3]), NAN),
    "infinite": torch.full((2, 5, 8), -INF),
    "enormous": torch.full((2, 5, 8), 1e38),
    "int64": torch.ones(2, 5, 8, dtype=torch.int64),
    "bool": torch.ones(2, 5, 8, dtype=torch.bool),
    "complex": torch.ones(2, 5, 8, dtype=torch.complex64),
}


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_hidden_states(tmp_path: Path, hidden: torch.Tensor) -> None:
    path = write(tmp_path / "face.safetensors", hidden)
    refused(lambda: load_face(path), path)


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_a_face_that_cannot_be_read_is_not_written(tmp_path: Path, hidden: torch.Tensor) -> None:
    path = tmp_path / "face.safetensors"
    refused(lambda: save_face(path, Face(hidden)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "weights",
    [(1.0,), (1.0, -1.0), (NAN, 1.0), (INF, 1.0), (1e308, 1e308), ("a", 1.0), (1, 2, 3), (None, 1.0), (10**400, 1)],
)
def test_weights_of_a_face(weights: tuple[Any, ...]) -> None:
    refused(lambda: Face(torch.ones(2, 5, 8), weights), "weights")


@pytest.mark.parametrize(
    "name",
    ["a\0b", "\ud800", "n" * 260, "n" * 5000, "a/" * 3000 + "b", "folder", "file/below"],
    ids=["NUL", "surrogate", "long", "longer", "deep", "folder", "below a file"],
)
def test_names_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    refused(lambda: save_face(tmp_path / name, Face(torch.ones(2, 5, 8))), "cannot be written")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    path = tmp_path / "face.safetensors"
    refused(lambda: save_face(path, Face(torch.ones(2, 5, 8))), path, "No space left")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "face.safetensors")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(lambda: load_face(path), path)


FILES = {
    "empty": b"",
    "text": b"no face",
    "photo": b"\xff\xd8\xff\xe0" + b"\0" * 100,
    "list": (2).to_bytes(8, "little") + b"[]",
    "json": json.dumps({"face": 1}).encode(),
    "enormous header": b"\xff" * 16,
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_files_of_another_kind(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "face.safetensors"
    path.write_bytes(data)
    refused(lambda: load_face(path), path)


@pytest.mark.parametrize(
    "key", ["hidden", "lora_unet_x", "projection.weight", "vision_model.x", "model.diffusion_model.x"]
)
def test_weights_of_another_kind(tmp_path: Path, key: str) -> None:
    path = tmp_path / "face.safetensors"
    save_file({key: torch.ones(2)}, path)
    refused(lambda: load_face(path), path)


@pytest.mark.parametrize("name", ["gone.safetensors", "folder.safetensors", "n" * 5000, "a\0b"])
def test_paths(tmp_path: Path, name: str) -> None:
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    refused(lambda: load_face(tmp_path / name), name[:80].split("\0")[0])
