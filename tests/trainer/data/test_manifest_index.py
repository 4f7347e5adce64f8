"""The index of a manifest holds what the manifest says, is made once, and is made anew when it has to be."""

from __future__ import annotations

import json
import os
import pickle
import random
import threading
from pathlib import Path

import pytest
from support.small_training import make_config, make_photos

from trainer.data import manifest_index
from trainer.data.dataset import FaceDataset, TensorShapes, make_loader
from trainer.data.manifest import Record, read_manifest, write_rows
from trainer.data.manifest_index import IndexedRecords, open_manifest
from trainer.data.order import GlobalBatches
from trainer.data.pictures import hash_distance
from trainer.data.records import Records, common_rule, fingerprint
from trainer.errors import TrainerError


@pytest.fixture
def manifest(tmp_path):
    return make_photos(tmp_path / "photos")


@pytest.fixture
def made(monkeypatch):
    """The indices that were made, one after the other."""
    folders, make = [], manifest_index._make

    def count(folder, *rest):
        folders.append(folder)
        return make(folder, *rest)

    monkeypatch.setattr(manifest_index, "_make", count)
    return folders


def open_index(manifest, tmp_path, root=None, drop_missing=False):
    return open_manifest(manifest, root, drop_missing, [tmp_path / "run"])


def many_rows(folder: Path, count: int) -> list[dict]:
    """Rows with every column there or not, of people with many photos and few, some of them nearly the same."""
    (folder / "a.png").touch()
    (folder / "b.png").touch()
    draw, near = random.Random(3), [0, 0b1011, 0x0F0F << 20, 2**64 - 1]
    rows = []
    for number in range(count):
        row = {"id": f"{draw.randrange(10**6)}-{number % 700}", "path": draw.choice("ab") + ".png"}
        row |= {"bbox": [1.5, 2, 30 + number, 40.25], "width": 5000, "height": 80, "caption": "Zoë 写真"[: number % 8]}
        row |= {"photo_hash": f"{draw.choice(near) ^ 1 << draw.randrange(64):016x}"} if number % 3 else {}
        row |= {"crop_hash": f"{draw.choice(near) ^ 1 << draw.randrange(64):016x}"} if number % 5 else {}
        row |= {"identity": f"person {draw.choice([number, number % 40, number % 7])}"} if number % 11 else {}
        row |= {"mask_path": "b.png", "crop_path": "a.png", "square_bbox": [-1, -2, 60, 59]} if number % 2 else {}
        row |= {"crop_scale": 1.3, "crop_border": "clamp", "crop_fill": 0.25} if number % 13 == 0 else {}
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_index_is_the_list(tmp_path, name):
    write_rows(tmp_path / name, many_rows(tmp_path, 1500))  # more than one batch of the file
    listed, _ = read_manifest(tmp_path / name)
    found = open_index(tmp_path / name, tmp_path)
    assert list(found) == listed and found[-1] == listed[-1] and found[3:9:2] == listed[3:9:2]
    assert found.fingerprint == fingerprint(listed) and found.rules == Records(listed).rules
    with pytest.raises(IndexError):
        found[len(listed)]
    for names in ((common_rule, found), (common_rule, listed)):
        with pytest.raises(TrainerError, match="made in 2 ways .1384 with 1.1, pad, fill 0.5, 116 with 1.3, clamp"):
            names[0](names[1])


def others(records: list[Record], index: int, distance: int) -> list[int]:
    """What ``People.others`` says, pair by pair."""
    target, found = records[index], []
    for other in sorted(range(len(records)), key=lambda number: records[number].id):
        photo = records[other]
        pairs = (target.photo_hash, photo.photo_hash), (target.crop_hash, photo.crop_hash)
        near = any(None not in pair and hash_distance(*pair) <= distance for pair in pairs)
        if target.identity is not None and target.identity == photo.identity and target.path != photo.path and not near:
            found.append(other)
    return found


@pytest.mark.parametrize("distance", [0, 3, 64])
def test_people_are_those_of_all_pairs(tmp_path, distance):
    write_rows(tmp_path / "m.jsonl", many_rows(tmp_path, 300))
    listed, _ = read_manifest(tmp_path / "m.jsonl")
    expected = [others(listed, index, distance) for index in range(300)]
    assert any(len(own) > 3 for own in expected) or distance == 64
    for records in (Records(listed), open_index(tmp_path / "m.jsonl", tmp_path)):
        assert [records.people.others(index, distance) for index in range(300)] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_an_index_are_those_of_the_list(manifest, tmp_path, workers):
    config = make_config(tmp_path, manifest, tmp_path / "run")
    batches = []
    for records in (read_manifest(manifest)[0], open_index(manifest, tmp_path)):
        dataset = FaceDataset(records, config, TensorShapes((4, 8, 8)))
        batches.append(list(make_loader(dataset, GlobalBatches(12, 4, 3, steps=6), workers)))
    for first, second in zip(*batches, strict=True):
        assert first.ids == second.ids and first.captions == second.captions and first.timesteps.equal(second.timesteps)
        assert first.pixels.equal(second.pixels) and first.crops.equal(second.crops) and first.masks.equal(second.masks)


def test_index_is_made_once_and_again_when_the_manifest_changes(manifest, tmp_path, made):
    first = open_index(manifest, tmp_path)
    assert list(open_index(manifest, tmp_path)) == list(first) and len(made) == 1
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    write_rows(manifest, rows[:5])
    assert len(open_index(manifest, tmp_path)) == 5 and len(made) == 2
    assert list(pickle.loads(pickle.dumps(open_index(manifest, tmp_path)))) == read_manifest(manifest)[0]
    open_index(manifest, tmp_path, manifest.parent)
    open_index(manifest, tmp_path, drop_missing=True)
    assert len(set(made)) == 3  # other questions are other indices
    assert len(made) == 4 and len(open_index(manifest, tmp_path)) == 5
    # What a cache brings along is used, although nothing can be written there.
    assert len(open_manifest(manifest, None, False, [tmp_path / "run", tmp_path / "other"])) == 5 and len(made) == 4


@pytest.mark.parametrize("file", ["records.arrow", "people.arrow"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "of another index"])
def test_damaged_index_is_made_anew(manifest, tmp_path, made, caplog, file, damage):
    expected = list(open_index(manifest, tmp_path))
    path = made[0] / file
    if damage == "gone":
        path.unlink()
    elif damage == "of another index":
        write_rows(tmp_path / "photos/less.jsonl", [json.loads(manifest.read_text().splitlines()[0])])
        open_index(tmp_path / "photos/less.jsonl", tmp_path)
        os.replace(made[1] / file, path)
    else:
        path.write_bytes(path.read_bytes()[: -40 if damage == "cut" else 0])
    before = len(made)
    assert list(open_index(manifest, tmp_path)) == expected and len(made) == before + 1
    assert "not a whole index" in caplog.text or damage == "of another index"


def test_flipped_bytes_never_end_the_process(tmp_path):
    write_rows(tmp_path / "m.jsonl", many_rows(tmp_path, 40))
    folder = open_index(tmp_path / "m.jsonl", tmp_path).folder
    whole, draw, refused = (folder / "records.arrow").read_bytes(), random.Random(0), 0
    for _ in range(60):
        damaged, place = bytearray(whole), draw.randrange(len(whole) - 8)
        damaged[place : place + 8] = draw.randbytes(8)
        (folder / "new").write_bytes(damaged)
        os.replace(folder / "new", folder / "records.arrow")
        try:
            assert len(list(IndexedRecords(folder))) == 40
        except TrainerError as error:
            refused += 1
            assert str(folder) in str(error)
    assert refused > 5


def test_bad_rows_have_the_errors_of_the_list_and_leave_nothing(manifest, tmp_path):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for index in range(7):
        rows[index]["path"] = f"gone-{index}.png"
    write_rows(manifest, rows)
    messages = []
    for read in (lambda: read_manifest(manifest), lambda: open_index(manifest, tmp_path)):
        with pytest.raises(TrainerError, match="7 of 12 manifest rows cannot be used") as error:
            read()
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "… and 2 more" in messages[0]
    assert [path.suffix for path in (tmp_path / "run").iterdir()] == [".lock"]
    listed, dropped = read_manifest(manifest, drop_missing=True)
    for _ in range(2):
        found = open_index(manifest, tmp_path, drop_missing=True)
        assert list(found) == listed and found.dropped == dropped[:5] and found.dropped_count == 7
    with pytest.raises(TrainerError, match="none.jsonl: no such file"):
        open_index(tmp_path / "none.jsonl", tmp_path)


def test_one_process_makes_the_index_and_the_others_wait(manifest, tmp_path, made):
    found = []
    start = threading.Barrier(4)

    def opens():
        start.wait()
        found.append(list(open_index(manifest, tmp_path)))

    threads = [threading.Thread(target=opens) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and found == [read_manifest(manifest)[0]] * 4
