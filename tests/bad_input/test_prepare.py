"""Preparing photos from bad tables and captions, into bad folders, and going on from a damaged progress file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from support.preparation import BOX, dropped_of, make_photo, rows_of, run
from support.refused import refused

from trainer.config import PrepareSettings
from trainer.errors import TrainerError
from trainer.preparation.identities import named_identity
from trainer.preparation.inputs import find_photos
from trainer.preparation.photo import Photo

NAN = float("nan")
QUICK = ("detect.detector=whole image", "mask.parser=ellipse", "identity.source=none", "sheet=0")
GOOD = {"path": "a.png", "caption": "a person", "identity": "ann", "bbox": BOX}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two photos to name in tables."""
    folder = tmp_path_factory.mktemp("photos")
    make_photo(folder / "a.png", 1)
    make_photo(folder / "b.png", 2)
    return folder


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PATHS = [5, True, ["a.png"], {"a": 1}, [], "a\0.png", "x" * 5000, "x/" * 3000, "y" * 300 + ".png", "\ud800.png",
         "~nobody-of-that-name/x.png"]  # fmt: skip
TEXTS = [1.5, True, ["a"], {"a": 1}, NAN, "\ud800", "x" * 200_000]
BOXES = ["text", 5, True, {}, {"0": 1, "1": 2, "2": 3, "3": 4}, [], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, None, 4],
    ["a", 0, 1, 2],
         [True, 0, 5, 9], [NAN, 0, 5, 9], [0, 0, float("inf"), 9], [0, 0, 1e15, 1e15], [0, 0, 10**400, 9]]  # fmt: skip
ROWS = [
    *[("path", value) for value in [*PATHS, None, "", "  "]],
    *[("mask_path", value) for value in PATHS],
    *[(name, value) for name in ("id", "caption", "identity") for value in TEXTS],
    *[("bbox", value) for value in BOXES],
    ("id", "  "),
]


@pytest.mark.parametrize(("name", "value"), ROWS)
def test_row_of_a_table(folder, name, value) -> None:
    path = write(folder / "table.jsonl", GOOD, {**GOOD, "path": "b.png", name: value})
    refused(lambda: find_photos(str(path)), path, "row 2", name, error=TrainerError)


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": "one"}, {"path": "b.png", "id": "one"}],
        [{"id": "b.png"}, {"path": "b.png"}],
        [{"path": "b.png"}, {"id": "b.png"}],
        [{"id": 1}, {"path": "b.png", "id": "1"}],
        [{}, {}],
        [{}, {"path": "./a.png", "id": "a.png"}],
    ],
)
def test_id_twice_loses_no_photo(folder, rows) -> None:
    path = write(folder / "twice.jsonl", *({**GOOD, **row} for row in rows))
    refused(lambda: find_photos(str(path)), path, "row 2", "row 1", error=TrainerError)


TABLES = {
    "empty.csv": (b"", "no rows"),
    "header.csv": (b"path,caption\n", "no rows"),
    "other.csv": (b"photo,caption\na.png,x\n", "row 1"),
    "twice.csv": (b"path,caption,path\na.png,x,b.png\n", "path"),
    "box.csv": (b"path,bbox\na.png,1 2 3\n", "row 1"),
    "words.csv": (b"path,bbox\na.png,a b c d\n", "row 1"),
    "nan.csv": (b"path,bbox\na.png,nan nan nan nan\n", "row 1"),
    "inf.csv": (b"path,bbox\na.png,0 0 1e999 9\n", "row 1"),
    "digits.csv": (b"path,bbox\na.png,0 0 " + b"9" * 5000 + b" 9\n", "row 1"),
    "line.csv": (b"path,bbox\na.png,1_0 20 30 40\n", "row 1"),
    "script.csv": ("path,bbox\na.png,١ 20 30 40\n".encode(), "row 1"),
    "more.csv": (b"path,caption\na.png,one, two\n", "row 1"),
    "latin.csv": ("path\né.png\n".encode("latin-1"), "UTF-8"),
    "utf16.csv": ("path\na.png\n".encode("utf-16"), ""),
    "nul.csv": (b"path\na\0.png\n", ""),
    "long.csv": (b"path,caption\na.png," + b"x" * 2**18 + b"\n", ""),
    "home.csv": (b"path\n~nobody-of-that-name/a.png\n", "row 1"),
    "picture.csv": (b"\x89PNG\r\n\x1a\n", ""),
    "quote.csv": (b'path,caption\n"a.png,x\n', ""),
    "ids.tsv": (b"id\tpath\n1\ta.png\n1\tb.png\n", "row 2"),
    "empty.jsonl": (b"", "no rows"),
    "list.jsonl": (b"[1]\n", "line 1"),
    "broken.jsonl": (b'{"path": "a.png"', "line 1"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "line 1"),
    "digits.jsonl": (b'{"id": ' + b"9" * 5000 + b"}\n", "line 1"),
    "key.jsonl": (b'{"path": "a.png", "path": "b.png"}\n', "line 1"),
    "broken.parquet": (b"PAR1", ""),
}


@pytest.mark.parametrize("name", TABLES)
def test_table(folder, name) -> None:
    content, named = TABLES[name]
    path = folder / name
    path.write_bytes(content)
    refused(lambda: find_photos(str(path)), path, named, error=TrainerError)


def test_space_after_a_comma_loses_no_column(folder) -> None:
    path = folder / "spaces.csv"
    path.write_text("path, caption, bbox\na.png, a person, 1 2 30 40\n")
    (photo,), _ = find_photos(str(path))
    assert photo.given == {"caption": "a person", "bbox": [1, 2, 30, 40]}


@pytest.mark.parametrize(
    "table",
    [
        pyarrow.table({"path": [b"a.png"]}),
        pyarrow.table({"path": [5]}),
        pyarrow.table({"path": ["a.png"], "caption": [1.5]}),
        pyarrow.table({"path": ["a.png"], "bbox": [[1.0, NAN, 2.0, 3.0]]}),
        pyarrow.table({"path": ["a.png", "b.png"], "id": ["x", "x"]}),
        pyarrow.table({"photo": ["a.png"]}),
    ],
    ids=["bytes", "number", "caption", "NaN", "ids", "no path"],
)
def test_parquet_table(folder, table) -> None:
    path = folder / "table.parquet"
    parquet.write_table(table, path)
    refused(lambda: find_photos(str(path)), path, "row", error=TrainerError)


@pytest.mark.parametrize(
    "source", ["gone", "gone/*.png", "a\0b", "x" * 5000, "~nobody-of-that-name/x", "/dev/null", "/proc/self/fd/99",
    "[", "\ud800",
               "a.png/b", "**/gone.png"]
)  # fmt: skip
def test_source_of_photos(folder, source, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    refused(lambda: run(source, folder / "out"), "photos", error=TrainerError)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\0", "é".encode("latin-1"), b"x" * 2**21], ids=["UTF-16", "Latin-1", "long"]
)
def test_caption_beside_the_photo(tmp_path, content) -> None:
    make_photo(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    refused(lambda: find_photos(str(tmp_path)), "a.txt", "caption", error=TrainerError)


def test_name_of_a_photo_that_is_not_utf8(tmp_path) -> None:
    make_photo(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xff.png"))
    refused(lambda: find_photos(str(tmp_path)), "photos", "UTF-8", error=TrainerError)


@pytest.mark.parametrize(
    "output", ["/proc/dataset", "/proc/self/dataset", "file", "file/dataset", "y" * 300, "/dev/null/x"]
)
def test_output_folder(folder, tmp_path, output) -> None:
    """Refused before a photo is opened."""
    (tmp_path / "file").touch()
    table = write(folder / "good.jsonl", GOOD)
    refused(
        lambda: run(table, tmp_path / output, *QUICK),
        "output",
        output if len(output) < 100 else "yyy",
        error=TrainerError,
    )


@pytest.mark.parametrize("name", ["manifest.jsonl", "dropped.jsonl", "summary.json", "contact_sheet.png",
    "progress.jsonl",
                                  "prepare.lock", "masks", "crops"])  # fmt: skip
def test_something_else_of_that_name_in_the_output_folder(folder, tmp_path, name) -> None:
    table, output = write(folder / "good.jsonl", GOOD), tmp_path / "out"
    output.mkdir()
    (output / name).touch() if name in ("masks", "crops") else (output / name).mkdir()
    refused(lambda: run(table, output, *QUICK[:-1]), output / name, error=TrainerError)


# Who is in the photo.


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)+$", "(.*)*b", "((a?){30}a{30})+x", "(a*)*(a*)*(a*)*b", "(?:(a|b|ab)*)*c"]
)
def test_pattern_without_end(tmp_path, pattern) -> None:
    """Run with a limit, before the photos are worked on."""
    make_photo(tmp_path / f"{'a' * 60}!.png")
    settings = (*QUICK[:2], "identity.source=pattern", f"identity.pattern='{pattern}'", "sheet=0")
    message = None
    try:
        run(tmp_path, tmp_path / "out", *settings)
    except TrainerError as error:
        message = str(error)
    assert message is None or ("identity.pattern" in message and not (tmp_path / "out/manifest.jsonl").exists())


def test_group_that_took_no_part(tmp_path) -> None:
    settings = PrepareSettings.load(None, ["identity.pattern='(x)?a'"], photos="a", output="b").identity
    assert named_identity(Photo("a.png", Path("a.png")), settings) == (None, "pattern")


class BrokenPool:
    """A pool of which the system has ended a process."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> BrokenPool:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, work: Any, batches: list[Any]) -> Iterator[Any]:
        raise BrokenProcessPool("a process was terminated abruptly")
        yield


def test_worker_that_the_system_ends(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("trainer.prepare.ProcessPoolExecutor", BrokenPool)
    table = write(folder / "good.jsonl", GOOD)
    refused(lambda: run(table, tmp_path / "out", *QUICK, "workers=1"), "workers=1", error=TrainerError)


# Going on from a damaged progress file.

LINES = {
    "cut off": '{"id": "a.png", "key"',
    "number": "5",
    "null": "null",
    "list": "[]",
    "empty": "{}",
    "id alone": '{"id": "a.png"}',
    "id of a list": '{"id": ["a.png"], "key": [], "reason": "", "detail": "", "vector": null, "row": {}}',
    "id of a number": '{"id": 5, "key": [], "reason": "", "detail": "", "vector": null, "row": {}}',
    "no row": '{"id": "a.png", "key": KEY, "reason": "", "detail": "", "vector": null}',
    "row of a list": '{"id": "a.png", "key": KEY, "reason": "", "detail": "", "vector": null, "row": []}',
    "empty row": '{"id": "a.png", "key": KEY, "reason": "", "detail": "", "vector": null, "row": {}}',
    "reason of a number": '{"id": "a.png", "key": KEY, "reason": 5, "detail": "", "vector": null, "row": {}}',
    "reason null": '{"id": "a.png", "key": KEY, "reason": null, "detail": null, "vector": null, "row": {}}',
    "vector of text": '{"id": "a.png", "key": KEY, "reason": "", "detail": "", "vector": "x", "row": ROW}',
    "deep": "[" * 100_000,
    "digits": '{"id": ' + "9" * 5000 + "}",
    "NUL": "\0\0\0",
}
COLUMNS = {
    "mask_path": [None, 5, [], "", "gone.png", "a\0b", "x" * 5000, "../../a.png", "/etc/passwd"],
    "crop_path": [None, 5, "gone.png"],
    "bbox": [None, "x", [1], [NAN, 0, 1, 2], [0, 0, 1e15, 1e15]],
    "square_bbox": [None, [1]],
    "photo_hash": [None, 5, "xyz", "f" * 40],
    "crop_hash": [None, "xyz"],
    "mask_kind": [None, 5, []],
    "mask_area": [None, "x", NAN],
    "detector": [None, 5, []],
    "caption": [5, []],
    "width": [None, "x", -1],
    "confidence": ["x"],
}


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory) -> Path:
    """An output folder with one photo."""
    output = tmp_path_factory.mktemp("prepared")
    run(write(folder / "one.jsonl", GOOD), output, *QUICK)
    return output


def go_on(folder: Path, output: Path, line: str) -> None:
    """A run from a progress file of one line is as one from none."""
    entry = json.loads((output / "good.jsonl").read_text() if (output / "good.jsonl").exists() else line)
    wanted = (output / "wanted.jsonl").read_text()
    line = line.replace("KEY", json.dumps(entry["key"])).replace("ROW", json.dumps(entry["row"]))
    (output / "progress.jsonl").write_text(line + "\n")
    summary = run(folder / "one.jsonl", output, *QUICK)
    assert summary["kept"] == 1 and dropped_of(output) == {}
    assert (output / "manifest.jsonl").read_text() == wanted
    assert (
        json.loads((output / "progress.jsonl").read_text().splitlines()[-1])["row"]["mask_kind"] == "ellipse from box"
    )


@pytest.fixture
def damaged(folder, prepared):
    """Runs from a progress file of one line."""
    progress = prepared / "progress.jsonl"
    if not (prepared / "good.jsonl").exists():
        (prepared / "good.jsonl").write_text(progress.read_text())
        (prepared / "wanted.jsonl").write_text((prepared / "manifest.jsonl").read_text())
    return lambda line: go_on(folder, prepared, line)


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_damaged_progress_is_work_to_be_done_again(damaged, line) -> None:
    damaged(line)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in COLUMNS.items() for value in values])
def test_damaged_row_of_the_progress(damaged, prepared, name, value) -> None:
    entry = json.loads((prepared / "good.jsonl").read_text())
    entry["row"][name] = value
    damaged(json.dumps(entry))


def test_progress_that_is_no_text(folder, prepared, damaged) -> None:
    (prepared / "progress.jsonl").write_bytes(b"\xff\xfe\0" * 100)
    assert run(folder / "one.jsonl", prepared, *QUICK)["kept"] == 1 and len(rows_of(prepared)) == 1


# Whatever comes in.

many = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["b.png", "\ud800", "a\0"])
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@many
@given(
    st.dictionaries(
        st.sampled_from(["id", "path", "caption", "identity", "bbox", "mask_path", "more"]), trees, max_size=4
    )
)
def test_any_row(folder, changes) -> None:
    path = write(folder / "any.jsonl", GOOD, {**GOOD, "path": "b.png", **changes})
    try:
        photos, _ = find_photos(str(path))
    except TrainerError as error:
        assert f"{path}, row 2" in str(error) and len(str(error)) < 1500
        return
    assert len({photo.id for photo in photos}) == 2 and all(photo.id.strip() for photo in photos)
    json.dumps([[photo.id, photo.given] for photo in photos], allow_nan=False, ensure_ascii=False).encode()


@many
@given(
    st.sampled_from([".csv", ".tsv", ".jsonl"]),
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: ("path,bbox\n" + text).encode("utf-8", "surrogatepass")),
)
def test_any_table(tmp_path_factory, suffix, content) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        photos, _ = find_photos(str(path))
    except TrainerError as error:
        assert str(path) in str(error) and len(str(error)) < 1500
        return
    assert len({photo.id for photo in photos}) == len(photos)
