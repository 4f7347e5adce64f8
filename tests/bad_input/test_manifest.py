"""Manifests that are wrong in one place each: rows, files, ids, boxes, and the pictures that they name."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from support.refused import refused

from trainer.data import pictures
from trainer.data.manifest import parse_row, read_manifest, read_rows, write_rows
from trainer.data.order import GlobalBatches
from trainer.data.reading import read_crop, read_picture
from trainer.data.records import fingerprint
from trainer.errors import TrainerError

NAN, INF = float("nan"), float("inf")
SIZE = (96, 80)
GOOD = {"path": "a.png", "caption": "a person", "width": 96, "height": 80, "bbox": [10, 20, 50, 60]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photos to name in manifests."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("a.png", "b.png"):
        Image.effect_noise(SIZE, 60).convert("RGB").save(folder / name)
    Image.new("L", SIZE, 255).save(folder / "mask.png")
    Image.new("RGB", (64, 64)).save(folder / "crop.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PATHS = [5, 1.5, True, ["a.png"], {"a": 1}, [], "gone.png", "a\0.png", "x" * 5000, "x/" * 3000, "y" * 300 + ".png",
    "\ud800.png",
         "~nobody-of-that-name/x.png", ".", "/", "a.png/b.png", "pipe.png", "/proc/self/mem/x"]  # fmt: skip
BOXES = ["text", "1234", "1,2,3,4", 5, True, {}, {"0": 1, "1": 2, "2": 3, "3": 4}, [], [1], [1, 2, 3], [1, 2, 3, 4,
    5], [1, 2, None, 4],
         ["a", "b", "c", "d"], [[1], 2, 3, 4], [True, 0, 5, 9], ["1", "2", "3", "4"], [NAN, 0, 5, 9], [0, 0, INF,
         9], [-INF, 0, 5, 9],
         [5, 5, 5, 9], [5, 5, 4, 9], [5, 9, 9, 5], [0, 0, 1e15, 1e15], [-1e15, -1e15, 20, 20], [0, 0, 10**400, 9],
         [0, 0, 1e7, 1e7],
         [1e300, 0, 1e301, 9], [10, 20, 10 + 1e-320, 60]]  # fmt: skip
OUTSIDE = [
    [500, 500, 600, 600],
    [96, 0, 120, 40],
    [-40, 0, 0, 40],
    [0, 80, 40, 120],
    [10, -40, 50, -1],
    [-3000, -3000, 3000, 3000],
]
TEXTS = [1.5, True, ["a"], {"a": 1}, NAN, "\ud800", "x" * 200_000]
WHOLES = ["text", "96", 1.5, 0, -1, True, [], NAN, 10**30, 10**400]
SHARES = ["text", "0.5", True, [], -0.1, NAN, INF, 1e308, 10**400]
HASHES = ["xyz", "f" * 17, "f" * 5000, -1, 2**64, 1.5, True, [], {}, "-1", "ü"]
ROWS = [
    *[(name, value) for name in ("path", "mask_path", "crop_path") for value in PATHS],
    ("path", None), ("path", ""), ("path", "  "), ("bbox", None), ("bbox", ""),
    *[(name, value) for name in ("bbox", "square_bbox") for value in [*BOXES, *OUTSIDE]],
    *[(name, value) for name in ("caption", "id", "identity") for value in TEXTS],
    *[(name, value) for name in ("width", "height") for value in WHOLES],
    *[(name, value) for name in ("crop_scale", "crop_fill") for value in SHARES],
    ("crop_scale", 0), ("crop_scale", 1e6), ("crop_fill", 2),
    *[("crop_border", value) for value in ("cut", 1, True, ["pad"], {})],
    *[(name, value) for name in ("photo_hash", "crop_hash") for value in HASHES],
    ("id", "  "), ("identity", "  "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), ROWS)
def test_row(folder, name, value) -> None:
    path = write(folder / "rows.jsonl", GOOD, {**GOOD, "path": "b.png", name: value})
    refused(lambda: read_manifest(path), path, "row 2", name, error=TrainerError)
    records, left_out = read_manifest(path, drop_missing=True)
    assert len(records) == 1 and len(left_out) == 1 and len(left_out[0]) < 1000


@pytest.mark.parametrize("box", OUTSIDE)
@pytest.mark.parametrize("known", [True, False])
def test_box_outside_the_photo(folder, box, known) -> None:
    """Found in the manifest, whether or not it gives the size of the photo."""
    row = {name: value for name, value in GOOD.items() if known or name not in ("width", "height")}
    path = write(folder / "boxes.jsonl", row, {**row, "path": "b.png", "bbox": box})
    refused(lambda: read_manifest(path), path, "row 2", "bbox", "96", error=TrainerError)


def test_photo_of_another_size_than_the_manifest_says(folder) -> None:
    path = write(folder / "sizes.jsonl", {**GOOD, "width": 960, "height": 800, "bbox": [300, 300, 600, 600]})
    (record,) = read_manifest(path)[0]
    for read in (lambda: read_picture(record, (64, 64), "face", 8), lambda: read_crop(record, 64)):
        refused(read, "a.png", "960", "96", error=TrainerError)


@pytest.mark.parametrize("square", [[-1e6, -1e6, 1e6, 1e6], [0, 0, 1e6, 1e6]])
def test_square_that_would_fill_the_memory(folder, square) -> None:
    row = {name: value for name, value in GOOD.items() if name not in ("width", "height")}
    path = write(folder / "squares.jsonl", {**row, "square_bbox": square})
    refused(lambda: read_manifest(path), path, "row 1", "square_bbox", error=TrainerError)


FILES = {
    "empty": (b"", "no rows"),
    "blank lines": (b"\n\n  \n", "no rows"),
    "not JSON": (b'{"path": "a.png"\n', "line 1"),
    "second line": (b'{"path": "a.png", "bbox": [1, 2, 3, 4]}\n{"pa', "line 2"),
    "list": (b"[1]\n", "line 1"),
    "null": (b"null\n", "line 1"),
    "text": (b'"a.png"\n', "line 1"),
    "deep": (b'{"path": ' + b"[" * 100_000 + b"\n", "line 1"),
    "deep and closed": (b'{"path": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1"),
    "5000 digits": (b'{"width": ' + b"9" * 5000 + b"}\n", "line 1"),
    "key twice": (b'{"path": "a.png", "path": "b.png", "bbox": [10, 20, 50, 60]}\n', "line 1"),
    "key twice, deep": (b'{"path": "a.png", "bbox": [10, 20, 50, 60], "more": {"a": 1, "a": 2}}\n', "line 1"),
    "Latin-1": ('{"path": "é.png"}\n'.encode("latin-1"), "UTF-8"),
    "UTF-16": ('{"path": "a.png"}\n'.encode("utf-16"), "UTF-8"),
    "NUL": (b"\0" * 100, "line 1"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ""),
    "a list of rows": (b'[{"path": "a.png"}]', "line 1"),
    "pretty": (b'{\n  "path": "a.png"\n}\n', "line 1"),
    "a line without end": (b'{"caption": "' + b"x" * 2**25, "line 1"),
}


@pytest.mark.parametrize(("content", "named"), FILES.values(), ids=FILES)
def test_file(tmp_path, content, named) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    refused(lambda: read_manifest(path), path, named, error=TrainerError)
    refused(lambda: read_manifest(path, drop_missing=True), path, named, error=TrainerError)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"{}", b"PAR1\xff\xff\xff\xffPAR1"])
def test_parquet_file(tmp_path, content) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(content)
    refused(lambda: read_manifest(path), path, error=TrainerError)


@pytest.mark.parametrize("cut", [20, 200, -20, -100])
def test_parquet_file_that_is_damaged(folder, cut) -> None:
    path = folder / "damaged.parquet"
    write_rows(path, [GOOD] * 3)
    content = bytearray(path.read_bytes())
    content[cut : cut + 8] = b"\xff" * 8
    path.write_bytes(content)
    try:
        assert len(read_manifest(path)[0]) == 3  # what was damaged says nothing of the rows
    except TrainerError as error:
        assert str(path) in str(error) and len(str(error)) < 1500


@pytest.mark.parametrize(
    "table",
    [
        pyarrow.table({"path": ["a.png"], "bbox": [[10.0, NAN, 50.0, 60.0]]}),
        pyarrow.table({"path": [b"a.png"], "bbox": [[10, 20, 50, 60]]}),
        pyarrow.table({"path": [5], "bbox": [[10, 20, 50, 60]]}),
        pyarrow.table({"path": ["a.png"], "bbox": ["10 20 50 60"]}),
        pyarrow.table({"path": ["a.png"], "bbox": [[10, 20, 50, 60]], "identity": [NAN]}),
        pyarrow.table({"path": ["a.png"], "bbox": [[10, 20, 50, 60]], "width": [96.5]}),
        pyarrow.table({"path": pyarrow.array([], pyarrow.string()),
                       "bbox": pyarrow.array([], pyarrow.list_(pyarrow.int64()))}),
        pyarrow.table([pyarrow.array(["a.png"]), pyarrow.array(["b.png"]), pyarrow.array([[10, 20, 50, 60]])],
                      names=["path", "path", "bbox"]),
        pyarrow.table({"path": ["a.png"], "bbox": [[Decimal(10), Decimal(20), Decimal(50), Decimal(60)]]}),
        pyarrow.table({"path": ["a.png"], "bbox": [{"x0": 10, "y0": 20, "x1": 50, "y1": 60}]}),
        pyarrow.table({"path": ["a.png"], "bbox": [[[10, 20, 50, 60]]]}),
        pyarrow.table({"path": ["a.png"], "bbox": [[10, 20, 50, 60]], "caption": [date(2020, 1, 1)]}),
        pyarrow.table({"path": ["a.png"], "bbox": [[10, 20, 50, 60]], "id": [datetime(2020, 1, 1)]}),
        pyarrow.table({"path": ["a.png"], "bbox": [[10, 20, 50, 60]], "width": [timedelta(1)]}),
        pyarrow.table({"photo": ["a.png"]}),
    ],
    ids=["NaN", "bytes", "number", "text box", "identity", "width", "no rows", "twice", "decimals", "struct", "nested",
         "date", "time", "duration", "other columns"],
)  # fmt: skip
def test_parquet_table(folder, table) -> None:
    path = folder / "table.parquet"
    parquet.write_table(table, path)
    refused(lambda: read_manifest(path), path, error=TrainerError)


@pytest.mark.parametrize(
    "path", ["", ".", "gone.jsonl", "table.xlsx", "table", "a\0.jsonl", "x" * 5000 + ".jsonl",
    "~nobody-of-that-name/m.jsonl",
             "\ud800.jsonl", "/dev/null", "pipe.png"]
)  # fmt: skip
def test_path_of_the_manifest(folder, monkeypatch, path) -> None:
    monkeypatch.chdir(folder)
    refused(lambda: read_manifest(path), "manifest", error=TrainerError)


def test_no_manifest_at_all() -> None:
    refused(lambda: read_manifest([]), "manifest", error=TrainerError)


@pytest.mark.parametrize("root", ["gone", "a\0b", "x" * 5000, "~nobody-of-that-name"])
def test_root_of_the_paths(folder, root) -> None:
    path = write(folder / "good.jsonl", GOOD)
    refused(lambda: read_manifest(path, root), "data.root", error=TrainerError)


@pytest.mark.parametrize(
    "ids",
    [["a", "a#2", "a"], ["a", "a", "a#2"], ["a#2", "a", "a"], ["a", "a", "a#2", "a#2"], ["a"] * 4, [None, None,
    "a.png#2"],
     [None, "a.png", None], [1, "1", 1]],
)  # fmt: skip
def test_ids_of_the_same_name_stay_apart(folder, ids) -> None:
    """A photo may come several times, with several captions: every record has an id of its own."""
    path = write(folder / "ids.jsonl", *({**GOOD, "id": name, "caption": str(n)} for n, name in enumerate(ids)))
    records, _ = read_manifest(path)
    assert [record.caption for record in records] == [str(number) for number in range(len(ids))]
    assert len({record.id for record in records}) == len(ids)


# Pictures.

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 80\n%%EndComments\n(x) run\nshowpage\n%%EOF\n"
PICTURES = {
    "EPS": EPS,
    "EPS with a preview": b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + len(EPS).to_bytes(4,
    "little") + b"\0" * 20 + EPS,
    "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "PSD": b"8BPS\0\1\0\0\0\0\0\0\0\3\0\0\0\x50\0\0\0\x60\0\x08\0\3" + b"\0" * 40,
    "WMF": b"\xd7\xcd\xc6\x9a\0\0\0\0\0\0\x60\0\x50\0\x48\0\0\0\0\0\0\0" + b"\1\0\x09\0" + b"\0" * 40,
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "text": b"no picture",
    "nothing": b"",
    "cut PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x60\0\0\0\x50\x08\2\0\0\0",
    "huge PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0\xa3\x9a\x4a\x95",
    "PPM bomb": b"P6 100000 100000 255\n",
}  # fmt: skip


@pytest.mark.parametrize("content", PICTURES.values(), ids=PICTURES)
def test_picture(tmp_path, content, monkeypatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("started Ghostscript"))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started a program"))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("started Ghostscript"))
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    refused(lambda: pictures.open_photo(path), path, error=TrainerError)
    refused(lambda: pictures.read_mask(path, SIZE), path, error=TrainerError)


def test_mask_of_another_shape(folder) -> None:
    refused(lambda: pictures.read_mask(folder / "crop.png", (96, 20)), "crop.png", "64", "96", error=TrainerError)


# What is written.


@pytest.mark.parametrize(
    ("suffix", "rows"),
    [("jsonl", [{"a": 1}, {"a": value}]) for value in ("\ud800", object(), NAN, {1, 2}, b"bytes")]
    + [("parquet", [{"a": 1}, {"a": value}]) for value in ("\ud800", object(), "text", [1])],
)
def test_rows_that_cannot_be_written_leave_nothing(tmp_path, suffix, rows) -> None:
    path = tmp_path / f"manifest.{suffix}"
    write_rows(path, [{"a": 1}])
    before = path.read_bytes()
    refused(lambda: write_rows(path, rows), path, error=TrainerError)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def broken_rows():
    yield {"a": 1}
    raise KeyError("of the caller")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_error_while_writing_leaves_no_part(tmp_path, suffix) -> None:
    with pytest.raises(KeyError, match="of the caller"):
        write_rows(tmp_path / f"manifest.{suffix}", broken_rows())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    ["table.xlsx", "manifest", "/proc/manifest.jsonl", "file/manifest.jsonl", "x" * 300 + ".jsonl", "folder.jsonl"],
)
def test_path_that_cannot_be_written(tmp_path, path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.jsonl").mkdir()
    refused(lambda: write_rows(tmp_path / path, [{"a": 1}]), path, error=TrainerError)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.jsonl"]


# The order of the samples.


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"count": 0}, "no samples"),
        ({"batch_size": 7, "accumulation": 2}, "train.batch_size"),
        ({"batch_size": 6, "processes": 4}, "train.batch_size"),
        ({"count": 10**7, "repeat": 1000}, "data.repeat"),
    ],
)
def test_order(changes, named) -> None:
    values = {"count": 10, "batch_size": 4, "seed": 0, "steps": 3} | changes
    refused(lambda: GlobalBatches(**values).global_batch(0), named, error=TrainerError)


# Whatever comes in.

many = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 10**400, 1e308, -1e-320, NAN, INF, 1e7])
leaves = (
    st.none()
    | st.booleans()
    | numbers
    | st.text(max_size=20)
    | st.sampled_from(["a.png", "mask.png", "\ud800", "a\0", "~nobody/x"])
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
COLUMNS = ["id", "path", "caption", "width", "height", "bbox", "square_bbox", "mask_path", "crop_path",
    "crop_scale", "crop_border",
           "crop_fill", "identity", "photo_hash", "crop_hash", "more"]  # fmt: skip


def sound(record: Any) -> None:
    """A record has a name, a photo, and squares that meet it; all that training takes from it can be written."""
    assert record.id.strip() and record.path.is_file()
    left, top, right, bottom = record.square
    assert left < 96 and top < 80 and right > 0 and bottom > 0 and right - left <= 4000
    json.dumps(
        {**asdict(record), "path": 0, "mask_path": 0, "crop_path": 0}, allow_nan=False, ensure_ascii=False
    ).encode()
    fingerprint([record])


@many
@given(st.dictionaries(st.sampled_from(COLUMNS), trees, max_size=5))
def test_any_row(folder, changes) -> None:
    try:
        record = parse_row({**GOOD, **changes}, folder)
    except TrainerError as error:
        assert any(name in str(error) for name in changes) and len(str(error)) < 1500
    else:
        sound(record)


@many
@given(st.lists(numbers, min_size=3, max_size=5) | st.lists(st.floats(-200, 200), min_size=4, max_size=4))
def test_any_box(folder, box) -> None:
    try:
        record = parse_row({**GOOD, "bbox": box}, folder)
    except TrainerError as error:
        assert "bbox" in str(error)
        return
    sound(record)
    pixels, mask = read_picture(record, (64, 64), "face", 8)
    assert torch.isfinite(pixels).all() and mask.shape == (1, 8, 8)
    assert torch.isfinite(read_crop(record, 16)).all()


@many
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(tmp_path_factory, content) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    try:
        assert all(isinstance(row, dict) for row in read_rows(path))
    except TrainerError as error:
        assert str(path) in str(error) and len(str(error)) < 1500
