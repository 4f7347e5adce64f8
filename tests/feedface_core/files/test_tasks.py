"""What is read from files: the same tasks however they are written, and every fault with its file and row."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from feedface_core.errors import FeedFaceError
from feedface_core.files.tasks import Task, read_tasks

one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
#: What people write in a prompt, lines, quotes, separators and other scripts included; no sign that has no UTF-8.
texts = (
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]) | st.sampled_from('\n",;\t|“é中🙂'), min_size=1)
    .map(str.strip)
    .filter(bool)
)
seeds = st.none() | st.integers(0, 2**64 - 1)
rows = st.lists(
    st.fixed_dictionaries(
        {"prompt": texts, "person": st.sampled_from(["anna", "Ben Müller", "1433"]), "seed": seeds},
        optional={"photos": st.just(["a.png", "b.png"]), "KSampler.sampler_name": st.sampled_from(["euler", "x y"])},
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def content(tasks: list[Task]) -> list[tuple[Any, ...]]:
    return [
        (task.person, task.prompt, task.seed, tuple(path.name for path in task.photos), task.settings) for task in tasks
    ]


def as_csv(records: list[dict[str, Any]], delimiter: str) -> str:
    names = sorted({name for record in records for name in record})
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names, delimiter=delimiter, restval="")
    writer.writeheader()
    for record in records:
        photos = {"photos": "|".join(record["photos"])} if "photos" in record else {}
        writer.writerow({name: "" if value is None else value for name, value in {**record, **photos}.items()})
    return out.getvalue()


@one_file
@given(records=rows, delimiter=st.sampled_from(",;\t"), mark=st.booleans())
def test_every_form_gives_the_same_tasks(
    folder: Path, records: list[dict[str, Any]], delimiter: str, mark: bool
) -> None:
    expected = [
        (
            record["person"],
            record["prompt"],
            record["seed"],
            tuple(record.get("photos", ())),
            {name: value for name, value in record.items() if "." in name},
        )
        for record in records
    ]
    forms = {
        "t.json": json.dumps(records),
        "t.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        "t.csv": as_csv(records, delimiter),
        "t.tsv": as_csv(records, "\t"),
    }
    for name, text in forms.items():
        (folder / name).write_bytes(("\ufeff" * mark + text).encode())
        assert content(read_tasks([folder / name])) == expected, name


@one_file
@given(
    people=st.lists(st.sampled_from(["anna", "ben", "éva", "d"]), min_size=1, unique=True),
    prompts=st.lists(texts, min_size=1, max_size=4),
    seeds=st.lists(st.integers(0, 9), max_size=3, unique=True),
)
def test_people_times_prompts_times_seeds(
    folder: Path, people: list[str], prompts: list[str], seeds: list[int]
) -> None:
    batch = {"people": [{"id": name, "photos": "a.png"} for name in people], "prompts": prompts, "seeds": seeds}
    (folder / "batch.json").write_text(json.dumps(batch))
    made = [(task.person, task.prompt, task.seed) for task in read_tasks([folder / "batch.json"])]
    assert made == [(name, text, seed) for name in people for text in prompts for seed in seeds or [None]]


@one_file
@given(data=st.binary(max_size=200), kind=st.sampled_from(["json", "jsonl", "csv", "tsv"]))
def test_any_bytes_are_tasks_or_an_error_with_the_file(folder: Path, data: bytes, kind: str) -> None:
    path = folder / f"any.{kind}"
    path.write_bytes(data)
    try:
        assert read_tasks([path])
    except FeedFaceError as problem:
        assert all(line.startswith((str(path), "…")) for line in str(problem).splitlines()), problem


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a.png", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "person", "people", "photos", "prompts", "prompt", "seed", "seeds", "settings", "caption_list"]
                + ["source_group", "path", "text", "KSampler.steps", "other", ""]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@one_file
@given(value=anything)
def test_any_json_is_tasks_or_an_error_with_the_file(folder: Path, value: Any) -> None:
    path = folder / "any.json"
    path.write_text(json.dumps(value))
    try:
        tasks = read_tasks([path])
        assert tasks and all(task.photos or task.prompt or task.settings for task in tasks)
    except FeedFaceError as problem:
        assert all(line.startswith((str(path), "…")) for line in str(problem).splitlines()), problem


def test_the_published_format(folder: Path) -> None:
    case = {
        "id": "1433",
        "caption_list": ["a man in sunglasses ", "a man wearing glasses"],
        "source_group": [{"path": "data_examples/b.png"}, {"path": "a.png"}],
        "class_word": "man",
    }
    (folder / "1433.json").write_text(json.dumps(case))
    tasks = read_tasks([folder])
    assert content(tasks) == [
        ("1433", text, None, ("b.png", "a.png"), {}) for text in ("a man in sunglasses", "a man wearing glasses")
    ]
    assert [task.prompt_name for task in tasks] == ["01", "02"]


def test_a_folder_of_photos(folder: Path) -> None:
    (folder / "rows.csv").write_text("person,photos,prompt\nanna,.,a person\n")
    (task,) = read_tasks([folder / "rows.csv"])
    assert [path.name for path in task.photos] == ["a.png", "b.png"]


PERSON = '{"id": "anna", "photos": ["a.png"]}'
#: File, content, what the message says.
FAULTS = {
    "no file": ("absent.csv", None, "absent.csv: there is no such file"),
    "another kind": ("t.xlsx", "x", "t.xlsx: expected a file that ends in .json, .jsonl"),
    "empty JSON": ("t.json", "", "t.json: broken JSON"),
    "empty list": ("t.json", "[]", "t.json: nothing in it"),
    "empty CSV": ("t.csv", "prompt\n", "t.csv: nothing in it"),
    "broken JSON": ("t.json", '{"people": [\n{]}', "t.json: broken JSON at line 2, column 2"),
    "broken line": ("t.jsonl", '{"prompt": "x"}\n{"prompt": \n', "t.jsonl, line 2: broken JSON at column"),
    "NaN": (
        "t.jsonl",
        '{"prompt": "x"}\n{"prompt": "x", "KSampler.cfg": NaN}',
        "t.jsonl, line 2: NaN is no JSON number",
    ),
    "infinity": ("t.json", '[{"prompt": "x", "K.cfg": 1e999}]', "t.json, entry 1: K.cfg: expected a finite number"),
    "name twice": ("t.json", '{"people": [], "people": []}', "t.json: 'people' is there twice in one object"),
    "no object": ("t.jsonl", "3", "t.jsonl, line 1: expected an object with names and values, found 3"),
    "too deep": ("t.json", "[" * 100_000, "t.json: broken JSON"),
    "not UTF-8": ("t.csv", b"prompt\na caf\xe9\n", "t.csv, line 2: not UTF-8: save it as UTF-8"),
    "unknown column": (
        "t.csv",
        "promt\nx\n",
        "t.csv, row 2: no column 'promt' is known (is 'prompt' meant?): there are id, person",
    ),
    "column twice": ("t.csv", "prompt,prompt\nx,y\n", "t.csv, row 1: the name 'prompt' is there twice"),
    "nameless column": ("t.csv", "prompt,,seed\nx,y,1\n", "t.csv, row 1: column 2 has no name"),
    "too many cells": ("t.csv", "prompt,seed\nx,1\na, b, 1\n", "t.csv, row 3: 3 cells under 2 names, left over: ' 1'"),
    "open quote": ("t.csv", 'prompt\n"x\n', "t.csv, line 2: broken CSV"),
    "seed": ("t.csv", "prompt,seed\nx,1\ny,one\n", "t.csv, row 3: seed: expected a whole number, found 'one'"),
    "negative seed": ("t.csv", "prompt,seed\nx,-1\n", "t.csv, row 2: seed: expected 0 to 18446744073709551615"),
    "seed a boolean": (
        "t.json",
        '[{"prompt": "x", "seed": true}]',
        "entry 1: seed: expected a whole number, found True",
    ),
    "NaN seed": ("t.csv", "prompt,seed\nx,nan\n", "t.csv, row 2: seed: expected a whole number, found 'nan'"),
    "nothing to make": ("t.csv", "person,seed\nanna,1\n", "t.csv, row 2: nothing to make"),
    "no photo": ("t.csv", "photos,prompt\nabsent.png,x\n", "t.csv, row 2: no photo 'absent.png': looked for "),
    "no photo of several": ("t.csv", "photos,prompt\na.png|c.png,x\n", "t.csv, row 2: no photo 'c.png'"),
    "no prompts": ("t.json", f'{{"people": [{PERSON}]}}', "t.json: prompts is missing"),
    "no photos": ("t.json", '{"people": [{"id": "anna"}], "prompts": ["x"]}', "t.json: people.0.photos is missing"),
    "empty prompt": ("t.json", f'{{"people": [{PERSON}], "prompts": [" "]}}', "t.json: prompts.0.text: String should"),
    "unknown name": ("t.json", f'{{"people": [{PERSON}], "prompts": ["x"], "seed": 1}}', "seed is not known here"),
    "person twice": (
        "t.json",
        f'{{"people": [{PERSON}, {PERSON}], "prompts": ["x"]}}',
        "t.json: people: id 'anna' is there twice",
    ),
    "person twice in two records": (
        "t.jsonl",
        '{"id": "7", "caption_list": ["x"], "source_group": [{"path": "a.png"}]}\n' * 2,
        "t.jsonl, line 2: person '7' is there twice, first in ",
    ),
    "no captions": ("t.json", '{"id": "7", "source_group": [{"path": "a.png"}]}', "t.json: caption_list is missing"),
    "no sources": ("t.json", '{"id": "7", "caption_list": ["x"]}', "t.json: source_group is missing"),
    "lone surrogate": ("t.json", r'[{"prompt": "\ud800"}]', r"t.json: \ud800 is half of a sign"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_file_and_row(folder: Path, fault: str) -> None:
    name, text, said = FAULTS[fault]
    if text is not None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FeedFaceError) as caught:
        read_tasks([folder / name])
    assert said in str(caught.value), caught.value
    assert str(caught.value).startswith(str(folder / name))


def test_all_rows_are_looked_at(folder: Path) -> None:
    (folder / "t.csv").write_text("photos,prompt\n" + "absent.png,x\n" * 14)
    with pytest.raises(FeedFaceError) as caught:
        read_tasks([folder / "t.csv"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and lines[9].startswith(f"{folder / 't.csv'}, row 11") and lines[10] == "… and 4 more"


def test_reading_needs_no_torch() -> None:
    """The queue runs on machines without it."""
    program = "import sys; sys.modules['torch'] = None; import feedface_core.files.tasks, tools.queue.__main__"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
