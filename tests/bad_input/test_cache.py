"""Caches that are damaged: shards, the file of hashes, the folder, and features that are no numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.refused import refused

from trainer.data.feature_store import FORMAT, FeatureStore, FileHashes
from trainer.errors import TrainerError

NAN, INF = float("nan"), float("inf")
KEYS = {"first": "1" * 32, "second": "2" * 32}
GOOD = {"format": FORMAT, "keys": json.dumps(list(KEYS.values())), "about": json.dumps({"model": "m"})}


def make_store(folder: Path) -> FeatureStore:
    return FeatureStore(folder, "face", {"model": "m"}, KEYS)


def write(folder: Path, metadata: dict[str, str] | None = GOOD, **tensors: torch.Tensor) -> Path:
    path = folder / "face-0.safetensors"
    save_file(tensors or {"hidden": torch.ones(2, 3)}, path, metadata)
    return path


def test_whole_shard_is_read(tmp_path) -> None:
    write(tmp_path)
    store = make_store(tmp_path)
    assert store.missing() == {} and store.get("first")["hidden"].tolist() == [1, 1, 1] and store.differences() == []


METADATA = {
    "none": None,
    "no format": {name: GOOD[name] for name in ("keys", "about")},
    "another format": {**GOOD, "format": "feedface-cache-99"},
    "no keys": {name: GOOD[name] for name in ("format", "about")},
    "no settings": {name: GOOD[name] for name in ("format", "keys")},
    **{f"keys {text[:12]!r}": {**GOOD, "keys": text} for text in
       ("", "{", "5", "null", "{}", '"text"', "[]", "[1, 2]", "[[1], [2]]", "[null, null]", "[" * 100_000, "9" * 5000,
        json.dumps([KEYS["first"]]), json.dumps([*KEYS.values(), "3" * 32]), json.dumps([KEYS["first"]] * 2))},
    **{f"settings {text[:12]!r}": {**GOOD, "about": text} for text in ("", "{", "5", "null", "[]", '"text"',
    "[" * 100_000)},
}  # fmt: skip


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_shard_of_damaged_metadata_is_named_and_made_again(tmp_path, caplog, metadata) -> None:
    path = write(tmp_path, metadata)
    store = make_store(tmp_path)
    assert set(store.missing().values()) == {"first", "second"}
    assert path.name in caplog.text and "ignored" in caplog.text
    assert store.differences() == []


@pytest.mark.parametrize(
    "tensors",
    [
        {"hidden": torch.ones(1, 3)},
        {"hidden": torch.ones(3, 3)},
        {"hidden": torch.ones(0, 3)},
        {"hidden": torch.tensor(1.0)},
        {"hidden": torch.ones(2, 3), "mask": torch.ones(1, 3)},
    ],
    ids=["fewer rows", "more rows", "no rows", "no dimension", "fewer rows in one"],
)
def test_shard_of_other_rows_is_named_and_made_again(tmp_path, caplog, tensors) -> None:
    path = write(tmp_path, **tensors)
    assert set(make_store(tmp_path).missing().values()) == {"first", "second"}
    assert path.name in caplog.text and "ignored" in caplog.text


HEADERS = {
    "empty": b"",
    "short": b"\1\2\3",
    "text": b"no shard at all",
    "no JSON": (5).to_bytes(8, "little") + b"{{{{{",
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "deep": (50_000).to_bytes(8, "little") + b"[" * 50_000,
    "offsets past the end": b"".join(
        [(80).to_bytes(8, "little"), b'{"hidden":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24000]}}'.ljust(80)]
    ),
    "negative shape": b"".join(
        [
            (80).to_bytes(8, "little"),
            b'{"hidden":{"dtype":"F32","shape":[-2,3],"data_offsets":[0,24]}}'.ljust(80),
            b"\0" * 24,
        ]
    ),
    "unknown type": b"".join(
        [
            (80).to_bytes(8, "little"),
            b'{"hidden":{"dtype":"F99","shape":[2,3],"data_offsets":[0,24]}}'.ljust(80),
            b"\0" * 24,
        ]
    ),
    "pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x08builtins",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_shard_of_a_broken_header_is_named_and_made_again(tmp_path, caplog, content) -> None:
    (tmp_path / "face-0.safetensors").write_bytes(content)
    store = make_store(tmp_path)
    assert set(store.missing().values()) == {"first", "second"} and "face-0.safetensors" in caplog.text
    for key in KEYS.values():
        store.add(key, {"hidden": torch.ones(3)})
    store.flush()
    assert make_store(tmp_path).missing() == {}


def test_folder_of_the_name_of_a_shard(tmp_path, caplog) -> None:
    (tmp_path / "face-0.safetensors").mkdir()
    assert set(make_store(tmp_path).missing().values()) == {"first", "second"} and "face-0" in caplog.text


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_feature_that_is_no_number_is_blamed_on_its_shard(tmp_path, value) -> None:
    hidden = torch.ones(2, 3)
    hidden[1, 2] = value
    path = write(tmp_path, hidden=hidden)
    store = make_store(tmp_path)
    assert store.get("first")["hidden"].tolist() == [1, 1, 1]
    refused(lambda: store.get("second"), path, "second", "NaN", error=TrainerError)


@pytest.mark.parametrize("value", [NAN, INF])
def test_feature_that_is_no_number_is_not_written(tmp_path, value) -> None:
    store = make_store(tmp_path)
    refused(
        lambda: store.add(KEYS["first"], {"hidden": torch.tensor([1.0, value])}), "first", "NaN", error=TrainerError
    )
    store.flush()
    assert list(tmp_path.iterdir()) == []


def test_shard_that_vanishes_or_changes_under_the_run(tmp_path) -> None:
    path = write(tmp_path)
    store = make_store(tmp_path)
    write(tmp_path, hidden=torch.ones(1, 3))
    refused(lambda: store.get("second"), path, error=TrainerError)
    path.unlink()
    refused(lambda: make_store_of_files(store).get("first"), path, error=TrainerError)


class Broken(torch.utils.data.Dataset):
    """Samples of a cache whose shard is damaged."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        raise TrainerError("face-0.safetensors: damaged")


def test_error_of_a_loader_process_is_the_same_line() -> None:
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1)
    assert refused(lambda: list(loader), error=TrainerError) == "face-0.safetensors: damaged"


def make_store_of_files(store: FeatureStore) -> FeatureStore:
    """As a loader process has it: with no file open."""
    copy = object.__new__(FeatureStore)
    copy.__dict__.update(store.__getstate__())
    return copy


FILE_ENTRIES = [
    *["5", "null", "[]", "{}", "[SIZE, TIME]", "[SIZE, TIME, 5]", "[SIZE, TIME, null]", '[SIZE, TIME, ["a"]]'],
    *['[SIZE, TIME, ""]', '[SIZE, TIME, "xyz"]', '["SIZE", TIME, "a"]', "[SIZE, TIME, NaN]"],
]
HASHES = ["", "{", "5", "null", "[]", '"text"', "[" * 100_000, "9" * 5000, '{"other": 5}', "\ud800"]
HASHES += [f'{{"FILE": {entry}}}' for entry in FILE_ENTRIES]


@pytest.mark.parametrize("text", HASHES)
def test_damaged_file_of_hashes_is_made_again(tmp_path, text) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    status, path = file.stat(), tmp_path / "files.json"
    wanted = FileHashes(tmp_path / "other.json").of(file)
    for word, value in (("FILE", str(file)), ("SIZE", str(status.st_size)), ("TIME", str(status.st_mtime_ns))):
        text = text.replace(word, value)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    hashes = FileHashes(path)
    assert hashes.of(file) == wanted
    hashes.save()
    assert json.loads(path.read_text())[str(file)][2] == wanted


@pytest.mark.parametrize("name", ["gone", "folder", "/proc/self/mem", "a\0b"])
def test_file_that_cannot_be_hashed(tmp_path, name) -> None:
    (tmp_path / "folder").mkdir()
    hashes = FileHashes(tmp_path / "files.json")
    refused(lambda: hashes.of(tmp_path / name), name, error=TrainerError)


@pytest.mark.parametrize("folder", ["/proc/cache", "file", "file/cache"])
def test_folder_that_cannot_be_written(tmp_path, folder) -> None:
    (tmp_path / "file").touch()
    refused(lambda: FileHashes(tmp_path / folder / "files.json").save(), folder, error=TrainerError)

    def fill() -> None:
        store = make_store(tmp_path / folder)
        store.add(KEYS["first"], {"hidden": torch.ones(3)})
        store.flush()

    refused(fill, folder, error=TrainerError)


def test_rows_of_several_shapes_lie_apart(tmp_path) -> None:
    store, rows = make_store(tmp_path), {"first": torch.ones(3), "second": torch.arange(4.0)}
    for name, hidden in rows.items():
        store.add(KEYS[name], {"hidden": hidden})
    store.flush()
    read = make_store(tmp_path)
    assert read.missing() == {} and len(list(tmp_path.glob("face-*.safetensors"))) == 2
    assert all(torch.equal(read.get(name)["hidden"], hidden) for name, hidden in rows.items())


many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(st.data())
def test_any_damage_to_a_shard(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("damage")
    path = write(folder)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    store = make_store(folder)
    for item, key in KEYS.items():
        if key not in store.missing():
            try:
                assert all(torch.isfinite(tensor).all() for tensor in store.get(item).values())
            except TrainerError as error:
                assert str(path) in str(error) and len(str(error)) < 1500


@many
@given(st.binary(max_size=100) | st.text(max_size=100).map(lambda text: json.dumps({text: text}).encode()))
def test_any_file_of_hashes(tmp_path_factory, content) -> None:
    folder = tmp_path_factory.mktemp("hashes")
    (folder / "files.json").write_bytes(content)
    (folder / "a").touch()
    assert len(FileHashes(folder / "files.json").of(folder / "a")) == 32
