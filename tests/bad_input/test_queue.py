"""The queue's files, workflows and journals that are none, refused by name before anything is sent."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.fake_comfyui import OBJECT_INFO, WORKFLOW
from support.refused import refused

from feedface_core.errors import listing
from feedface_core.files.tables import read_text
from feedface_core.files.tasks import read_tasks
from tools.queue.journal import Journal
from tools.queue.plan import make_plan
from tools.queue.references import ENCODER, branch_of
from tools.queue.workflow import find_targets, positive_texts, read_workflow

PERSON = {"people": [{"id": "a", "photos": ["a.png"]}], "prompts": ["x"]}
#: Name of a file of tasks, what it holds.
TASKS: dict[str, tuple[str, Any]] = {
    "60,000 names": ("json", "{" + ",".join(f'"a{i}":1' for i in range(60_000)) + "}"),
    "a name twice": ("json", '{"prompt": "x", "prompt": "y"}'),
    "millions": ("json", {"people": [{"id": str(i), "photos": ["a"]} for i in range(1001)], "prompts": ["x"] * 1001}),
    "30,000 alike": ("json", PERSON | {"people": PERSON["people"] * 30_000}),
    "half a sign": ("jsonl", '{"prompt": "\\ud800"}'),
    "half a sign for an input": ("jsonl", '{"Positive prompt.text": "\\udfff"}'),
    "half a sign in a name": ("jsonl", '{"KSampler.\\ud800": 1}'),
    "NUL": ("jsonl", '{"prompt": "a\\u0000b"}'),
    "NUL for an input": ("jsonl", '{"Positive prompt.text": "a\\u0000b"}'),
    "NUL in a cell": ("csv", "prompt\na\0b\n"),
    "50,000 columns": ("csv", ",".join(f"a{i}" for i in range(50_000)) + "\n" + ",".join("1" * 50_000) + "\n"),
    "zero width": ("csv", "\u200bprompt\nx\n"),
    "seed 1_0": ("jsonl", '{"prompt": "x", "seed": "1_0"}'),
    "seed of other digits": ("jsonl", '{"prompt": "x", "seed": "\\u0661"}'),
    "steps 1_0": ("jsonl", '{"KSampler.steps": "1_0"}'),
    "wide steps": ("jsonl", '{"KSampler.steps": "\\uff11"}'),
    "cfg 1_0.5": ("jsonl", '{"KSampler.cfg": "1_0.5"}'),
    "name of 400 bytes": ("jsonl", {"id": "\U0001f600" * 100, "prompt": "x"}),
    "long photo": ("jsonl", {"photos": ["a" * 5000]}),
    "deep photo": ("jsonl", {"photos": ["a/" * 3000]}),
    "long title": ("jsonl", {"a" * 100_000 + ".x": 1}),
    "long value": ("jsonl", {"KSampler.steps": "a" * 100_000}),
    "long choice": ("jsonl", {"KSampler.sampler_name": "a" * 100_000}),
    "pipe": ("jsonl", {"photos": ["pipe.png"]}),
    "folder with a pipe": ("jsonl", {"photos": ["pipes"]}),
    "pipe for an input": ("jsonl", {"Photo.image": "pipe.png"}),
    "device": ("jsonl", {"photos": ["/dev/zero"]}),
    "deep": ("json", "[" * 100_000),
}
#: Bytes of a photo, by its name.
PHOTOS = {
    "text.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 9,
    "token.ppm": b"P6 99999999999 1 255 a",
    "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "huge.tga": b"\0\0\2" + b"\0" * 9 + b"\xff\xff\xff\xff\x18\0",
}
#: What is done to the workflow, and what the message names.
WORKFLOWS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "_meta text": (lambda flow: flow["1"].update(_meta="x"), "node '1': _meta is 'x'"),
    "_meta list": (lambda flow: flow["1"].update(_meta=[1]), "node '1': _meta is [1]"),
    "title number": (lambda flow: flow["1"].update(_meta={"title": 5}), "node '1': _meta.title is 5"),
    "title list": (lambda flow: flow["1"].update(_meta={"title": []}), "node '1': _meta.title is []"),
    "kind list": (lambda flow: flow["1"].update(class_type=[1]), "node '1': class_type is [1]"),
    "kind null": (lambda flow: flow["1"].update(class_type=None), "node '1': class_type is None"),
    "inputs list": (lambda flow: flow["1"].update(inputs=[]), "node '1': inputs is []"),
    "inputs null": (lambda flow: flow["1"].update(inputs=None), "node '1': inputs is None"),
    "node text": (lambda flow: flow.update({"7": "x"}), "node '7': expected class_type and inputs"),
    "link to nobody": (
        lambda flow: flow["3"]["inputs"].update(positive=["99", 0]),
        "'positive' is linked to node '99'",
    ),
    "empty link": (lambda flow: flow["3"]["inputs"].update(positive=[]), "shows no place for the prompt"),
    "nested link": (lambda flow: flow["3"]["inputs"].update(positive=[["2"], 0]), "shows no place for the prompt"),
    "link to itself": (lambda flow: flow["3"]["inputs"].update(positive=["3", 0]), "shows no place for the prompt"),
}
JOURNALS = {
    "other columns": "CREATE TABLE job (name TEXT, other TEXT)",
    "no JSON": "INSERT INTO job VALUES ('a', 'b', 'done', 'c', 'd', 1, 'no JSON')",
    "null": "INSERT INTO job VALUES ('a', 'b', 'done', 'c', 'd', 1, 'null')",
    "no files": "INSERT INTO job VALUES ('a', 'b', 'done', 'c', 'd', 1, '{}')",
    "files of numbers": "INSERT INTO job VALUES ('a', 'b', 'done', 'c', 'd', 1, '{\"files\": [5]}')",
    "another state": "INSERT INTO job VALUES ('a', 'b', 'resting', 'c', 'd', 1, '{}')",
    "a blob": "INSERT INTO job VALUES (x'ff', 'b', 'sent', 'c', 'd', 1, '{}')",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "pipes").mkdir()
    for name in ("pipe.png", "pipes/pipe.png", "pipe.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    return tmp_path


def write(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else _text(content).encode())
    return path


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def plan(tasks: Path, workflow: dict[str, Any] | None = None) -> Any:
    flow = WORKFLOW if workflow is None else read_workflow(write(tasks.parent / "workflow.json", workflow))
    return make_plan(read_tasks([tasks]), flow, find_targets(flow), OBJECT_INFO)


@pytest.mark.parametrize("label", TASKS)
def test_tasks(folder: Path, label: str) -> None:
    kind, content = TASKS[label]
    path = write(folder / f"tasks.{kind}", content)
    refused(lambda: plan(path), path)


@pytest.mark.parametrize("name", ["pipe.json", "zero.json", "a" * 5000 + ".json", "a/" * 3000 + "b.json"])
def test_tasks_that_are_no_file(folder: Path, name: str) -> None:
    refused(lambda: read_tasks([folder / name]), str(folder / name)[:300])
    refused(lambda: read_text(folder / name), str(folder / name)[:300])


@pytest.mark.parametrize("name", PHOTOS)
def test_photos(folder: Path, name: str) -> None:
    write(folder / name, PHOTOS[name])
    refused(lambda: plan(write(folder / "tasks.json", {"photos": [name]})), "tasks.json", name)


@pytest.mark.parametrize("label", WORKFLOWS)
def test_workflow(folder: Path, label: str) -> None:
    change, named = WORKFLOWS[label]
    flow = deepcopy(WORKFLOW)
    change(flow)
    refused(lambda: plan(write(folder / "tasks.json", PERSON), flow), named)


def test_half_a_sign_in_a_workflow(folder: Path) -> None:
    path = write(folder / "workflow.json", json.dumps(WORKFLOW).replace("KSampler", "\\ud800"))
    refused(lambda: read_workflow(path), path, "\\ud800 is half of a sign")


def test_long_ways_through_a_graph_are_followed() -> None:
    """A chain of thousands of nodes, and 30 forks in a row: a thousand million ways."""
    flow = {str(i): {"class_type": "Combine", "inputs": {"conditioning": [str(i + 1), 0]}} for i in range(5000)}
    flow |= {"5000": {"class_type": "CLIPTextEncode", "inputs": {"text": "x"}}}
    flow |= {"end": {"class_type": "KSampler", "inputs": {"positive": ["0", 0]}}}
    assert [place.node for place in positive_texts(flow)] == ["5000"]
    chain = {str(i): {"class_type": "Scale", "inputs": {"image": [str(i - 1), 0]}} for i in range(1, 5000)}
    chain |= {
        "0": {"class_type": "LoadImage", "inputs": {}},
        "end": {"class_type": ENCODER, "inputs": {"crops": ["4999", 0]}},
    }
    assert len(branch_of(chain, "0") or ()) == 5001
    forks: dict[str, Any] = {"a0": {"class_type": "LoadImage", "inputs": {}}}
    forks |= {
        "b0": {"class_type": "LoadImage", "inputs": {}},
        "end": {"class_type": ENCODER, "inputs": {"crops": ["a30", 0]}},
    }
    for i in range(1, 31):
        links = {"one": [f"a{i - 1}", 0], "two": [f"b{i - 1}", 0]}
        forks |= {f"{side}{i}": {"class_type": "Blend", "inputs": dict(links)} for side in "ab"}
    assert branch_of(forks, "a0") is None
    assert branch_of(forks | {"end": {"class_type": "SaveImage", "inputs": {}}}, "a0") is None


@pytest.mark.parametrize("label", JOURNALS)
def test_journal_of_somebody_else(tmp_path: Path, label: str) -> None:
    path = tmp_path / Journal.NAME
    if label != "other columns":
        Journal(tmp_path).close()
    with sqlite3.connect(path) as database:
        database.execute(JOURNALS[label])
    database.close()
    refused(lambda: Journal(tmp_path), path, "not a journal of this queue")


def test_names_in_a_message_stay_on_its_line() -> None:
    assert listing(["a\n\x1b[31mb", "ß 漢"]) == "a\\n\\x1b[31mb, ß 漢"
