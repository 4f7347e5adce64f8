"""The identity benchmark's folders, and the demo's: refused by the option's name before anything is drawn."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from support.refused import refused

from benchmarks import identity
from benchmarks.support.identity_options import known_groups
from examples.small_model import system
from tools import demo
from trainer.errors import TrainerError, exit_code


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A small model as far as it is looked at, and a benchmark that ends where it would begin to draw."""

    def begin(*_: object) -> None:
        raise AssertionError("began to draw")

    monkeypatch.setattr(identity, "draw_people", begin)
    folder = tmp_path / "model"
    for name in ("model_index.json", system.PEOPLE, "vae/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(system.FOLDER / name, folder / name)
    (folder / "examiner").symlink_to(system.FOLDER / "examiner")
    (folder / "adapter").symlink_to(system.FOLDER / "adapter")
    return folder


def run(model: Path, *arguments: object) -> int:
    return identity.main(["--model", str(model), *map(str, arguments)])


def test_a_whole_model_is_let_through(model, tmp_path) -> None:
    for quick in ((), ("--quick",)):
        with pytest.raises(AssertionError, match="began to draw"):
            run(model, "--work", tmp_path / "work", "--report", tmp_path / "report", *quick)


@pytest.mark.parametrize("name", ["gone", "file", "empty", "a\0b", "x" * 5000, "~nobody-of-that-name/x", ""])
def test_model(model, tmp_path, name) -> None:
    (tmp_path / "file").write_text("no model")
    (tmp_path / "empty").mkdir()
    given = tmp_path / name if name in ("gone", "file", "empty") else name
    message = refused(lambda: run(given, "--work", tmp_path / "work"), "--model", error=TrainerError)
    assert "\n" not in message and not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", [system.PEOPLE, "vae/config.json", "examiner"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"{}", b"[1]", b"\xff\xfe"])
def test_part_of_a_model(model, tmp_path, name, content) -> None:
    if name == "examiner":
        (model / name).unlink()
        shutil.copytree(system.FOLDER / name, model / name)
        name = "examiner/identity.safetensors"
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    if (name, content) == (system.PEOPLE, b"{}"):
        return  # all of its settings have defaults
    message = refused(lambda: run(model, "--work", tmp_path / "work"), "--model", model, error=TrainerError)
    assert "\n" not in message


def test_model_without_an_adapter(model, tmp_path) -> None:
    (model / "adapter").unlink()
    refused(lambda: run(model, "--work", tmp_path / "work"), "--model", system.ADAPTER, error=TrainerError)


@pytest.mark.parametrize("option", ["--work", "--report"])
@pytest.mark.parametrize("name", ["file", "file/below", "/proc/folder", "a\0b", "x" * 300, "~nobody-of-that-name/x"])
def test_folder_to_write_to(model, tmp_path, option, name) -> None:
    (tmp_path / "file").write_text("no folder")
    given = {"--work": tmp_path / "work", "--report": tmp_path / "report"}
    given[option] = tmp_path / name if name.startswith(("file", "x")) else name
    options = [word for pair in given.items() for word in pair]
    assert "\n" not in refused(lambda: run(model, *options), option, error=TrainerError)


def test_people_that_are_a_file(model, tmp_path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "people").write_text("no folder")
    refused(lambda: run(model, "--work", tmp_path / "work"), "--work", "people", error=TrainerError)


@pytest.mark.parametrize("groups", [["nonsense"], ["main", "Main"], [""], ["x" * 5000]])
def test_groups(model, tmp_path, groups) -> None:
    refused(lambda: run(model, "--groups", *groups), "--groups", "main", "references", error=TrainerError)


def test_known_groups_are_those_of_the_rows() -> None:
    assert {"main", "references", "regions"} <= set(known_groups(quick=True)) < set(known_groups(quick=False))


def test_exit_code_and_line_of_the_benchmark(tmp_path, capsys) -> None:
    assert exit_code(lambda: run(tmp_path / "gone")) == 1
    assert capsys.readouterr().err.startswith("error: --model ")


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/folder", "a\0b", "x" * 300, "loop", "pipe", "taken"])
def test_output_of_the_demo(tmp_path, monkeypatch, name) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "taken" / "people.png").mkdir(parents=True)
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    given = name if name.startswith(("/", "a")) else str(tmp_path / name)
    monkeypatch.setattr(demo, "draw_people", lambda *_: pytest.fail("began to draw"))
    monkeypatch.setattr(sys, "argv", ["run.py demo", "--output", given])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert str(ended.value).startswith("FeedFace: --output ") and "\n" not in str(ended.value)


def test_output_of_the_demo_that_can_be_written_is_left_as_it_was(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    demo.make_output(tmp_path)
    demo.make_output(tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "mine.txt"]
