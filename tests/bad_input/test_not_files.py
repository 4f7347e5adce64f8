"""Pipes, devices, sockets, folders and loops of links where a file is expected: refused by name, never waited for."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from support.preparation import make_photo
from support.refused import refused

from feedface_core.errors import FeedFaceError
from feedface_core.faces import load_image
from feedface_core.files.json_file import read_json
from trainer.config import PrepareSettings
from trainer.data import pictures
from trainer.data.feature_store import FeatureStore, FileHashes
from trainer.data.manifest import read_manifest
from trainer.data.manifest_index import IndexedRecords, open_manifest
from trainer.data.shards import Folder, Shard, ShardedFeatures, read_header
from trainer.errors import TrainerError
from trainer.evaluate.drawing import stamp_of
from trainer.evaluate.memo import Memo, digest_of
from trainer.evaluate.people import read_prompts
from trainer.preparation.inputs import find_photos
from trainer.preparation.journal import NAME, Journal
from trainer.prepare import prepare
from trainer.training.checkpoint import load_checkpoint, load_latest, save_checkpoint

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes and devices among files")


def _socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the longest path of a socket is a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(path.name)
    finally:
        os.chdir(before)


KINDS: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "loop": lambda path: path.symlink_to(path.name),
}
"""What stands in a file's place."""


@pytest.fixture(params=KINDS)
def put(request) -> Callable[[Path], Path]:
    """Puts something that is no file at a path."""

    def make(path: Path) -> Path:
        path.unlink(missing_ok=True)
        KINDS[request.param](path)
        return path

    return make


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "photo": ("a.png", pictures.open_photo),
    "mask": ("a.png", lambda path: pictures.read_mask(path, (8, 8))),
    "photo of the core": ("a.png", load_image),
    "hash": ("a.png", lambda path: FileHashes(path.with_name("hashes.json")).of(path)),
    "digest": ("a.png", digest_of),
    "settings of a model": ("config.json", lambda path: read_json(path, dict)),
    "prompts": ("prompts.txt", read_prompts),
    "manifest": ("photos.jsonl", read_manifest),
    "manifest in Parquet": ("photos.parquet", read_manifest),
    "manifest by its index": ("rows.jsonl", lambda path: open_manifest(path, None, False, [path.parent / "index"])),
}


@pytest.mark.parametrize("reader", READERS)
def test_read(tmp_path, put, reader) -> None:
    name, read = READERS[reader]
    path = put(tmp_path / name)
    refused(lambda: read(path), path, error=FeedFaceError)


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl", "table.parquet"])
def test_table_of_photos(tmp_path, put, name) -> None:
    path = put(tmp_path / name)
    refused(lambda: find_photos(str(path)), path, error=TrainerError)


@pytest.mark.parametrize("name", [NAME, "memo.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
def test_log_to_go_on_from(tmp_path, kind, name) -> None:
    KINDS[kind](path := tmp_path / name)
    refused(lambda: Journal(tmp_path, "") if name == NAME else Memo(path), path, kind, error=TrainerError)


def test_what_is_made_anew(tmp_path, put, caplog) -> None:
    """Sizes of photos, stamps of pictures, hashes and shards of a cache: known by what can be read."""
    path = put(tmp_path / "a.png")
    assert pictures.size_of(path) is None and stamp_of(path) is None
    assert FileHashes(path).known == {} and str(path) in caplog.text
    shard = put(tmp_path / "face-0.safetensors")
    store = FeatureStore(tmp_path, "face", {}, {"a": "1" * 32})
    assert list(store.missing().values()) == ["a"] and str(shard) in caplog.text


def test_shard_of_a_cache_under_the_run(tmp_path, put) -> None:
    store = FeatureStore(tmp_path, "face", {}, {"a": "1" * 32})
    store.add("1" * 32, {"hidden": torch.ones(3)})
    store.flush()
    store.read_index()
    path = put(store.shards[0])
    refused(lambda: store.get("a"), path, error=TrainerError)


@pytest.mark.parametrize("name", ["records.arrow", "people.arrow"])
def test_index_of_a_manifest(tmp_path, put, name) -> None:
    Image.new("RGB", (96, 80)).save(tmp_path / "a.png")
    manifest = tmp_path / "photos.jsonl"
    manifest.write_text(json.dumps({"path": "a.png", "bbox": [10, 20, 50, 60]}) + "\n")
    (tmp_path / "index").mkdir()
    folder = open_manifest(manifest, None, False, [tmp_path / "index"]).folder
    put(folder / name)
    refused(lambda: IndexedRecords(folder), folder, error=TrainerError)
    assert len(open_manifest(manifest, None, False, [tmp_path / "index"])) == 1


def test_lock_of_an_index(tmp_path) -> None:
    Image.new("RGB", (96, 80)).save(tmp_path / "a.png")
    manifest = tmp_path / "photos.jsonl"
    manifest.write_text(json.dumps({"path": "a.png", "bbox": [10, 20, 50, 60]}) + "\n")
    (tmp_path / "index").mkdir()
    folder = open_manifest(manifest, None, False, [tmp_path / "index"]).folder
    shutil.rmtree(folder)
    lock = folder.with_name(f"{folder.name}.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()
    refused(lambda: open_manifest(manifest, None, False, [tmp_path / "index"]), lock, error=TrainerError)


@pytest.mark.parametrize("name", ["header.json", "shard-000000.safetensors", "places.arrow"])
def test_shards(tmp_path, put, name) -> None:
    put(tmp_path / name)
    read = {
        "header.json": lambda: read_header(Folder(str(tmp_path))),
        "shard-000000.safetensors": lambda: Shard(Folder(str(tmp_path)), name),
        "places.arrow": lambda: ShardedFeatures(Folder(str(tmp_path)), tmp_path, {}),
    }[name]
    refused(read, name, error=TrainerError)


@pytest.mark.parametrize("column", [["a"], [None], [1.5], [[1]], [True]])
def test_places_of_another_type(tmp_path, column) -> None:
    batch = pyarrow.record_batch({name: np.zeros(1, np.int64) for name in ("shard", "text", "face")} | {"row": column})
    with pyarrow.OSFile(str(tmp_path / "places.arrow"), "wb") as file, pyarrow.ipc.new_file(file, batch.schema) as out:
        out.write_batch(batch)
    read = lambda: ShardedFeatures(Folder(str(tmp_path)), tmp_path, {})  # noqa: E731
    refused(read, tmp_path / "places.arrow", error=TrainerError)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "trainables.safetensors", "optimiser.safetensors"])
def test_checkpoint(tmp_path, put, name, caplog) -> None:
    tensors = {"weight": torch.ones(3)}
    first = save_checkpoint(tmp_path, {"trainables": tensors, "optimiser": {}}, {"step": 4}, 3)
    second = save_checkpoint(tmp_path, {"trainables": tensors, "optimiser": {}}, {"step": 5}, 3)
    put(second / name)
    refused(lambda: load_checkpoint(second), second, name, error=TrainerError)
    assert load_latest(tmp_path).path == first and second.name in caplog.text


def test_among_the_photos_to_prepare(tmp_path) -> None:
    """Each is left out with its reason, and no other photo is lost."""
    photos = tmp_path / "photos"
    photos.mkdir()
    make_photo(photos / "good.png", 1)
    for kind, make in KINDS.items():
        make(photos / f"{kind}.jpg")
    (photos / "astray.jpg").symlink_to("gone.jpg")
    (photos / "empty.jpg").write_bytes(b"")
    quick = ("detect.detector=whole image", "mask.parser=ellipse", "identity.source=none", "sheet=20")
    summary = prepare(PrepareSettings.load(None, quick, photos=str(photos), output=str(tmp_path / "out")), False)
    assert summary["kept"] == 1
    assert summary["dropped"] == {"not a file": 4, "missing file": 2, "empty file": 1}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["manifest.jsonl", "dropped.jsonl", "summary.json", "contact_sheet.png"])
def test_in_place_of_what_preparation_writes(tmp_path, kind, name) -> None:
    make_photo(tmp_path / "good.png", 1)
    (tmp_path / "out").mkdir()
    KINDS[kind](tmp_path / "out" / name)
    quick = ("detect.detector=whole image", "mask.parser=ellipse", "identity.source=none", "sheet=4")
    prepare(PrepareSettings.load(None, quick, photos=str(tmp_path), output=str(tmp_path / "out")), False)
    assert (tmp_path / "out" / name).is_file()
