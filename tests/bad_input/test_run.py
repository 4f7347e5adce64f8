"""Environment variables and options of ``run.py`` and what it starts: named where they are wrong; nothing is lost."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from support.refused import refused

from tools import environment, find_comfyui
from tools.environment import Environment, environment_folder, read_requirements
from tools.find_comfyui import Stop, find_oldest, version_of
from tools.options import number, whole
from tools.queue.__main__ import main as queue

NO_PATH = ["~nobodyhere/x", "/nowhere", "a" * 5000, "a/" * 3000, "https://example.org/x", "\u2603", "loop", "file"]
NO_WHOLE = ["", "x", "0", "-1", "11", "1.0", "1e1", "1_0", "\u0661", "9" * 5000, "nan", "0x1", " ", "None", "--"]
NO_NUMBER = ["", "x", "0", "-1", "10.5", "nan", "inf", "-inf", "1e999", "9" * 5000, "1,5"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def comfyui(folder: Path, version: bytes = b'__version__ = "0.33.0"') -> Path:
    (folder / "comfy").mkdir(parents=True)
    for name, content in (("main.py", b""), ("comfyui_version.py", version), ("comfy/model_patcher.py", b"")):
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("variable", ["COMFYUI_PATH", "COMFYUI_OLDEST_PATH", "COMFYUI_OLDEST_PYTHON"])
@pytest.mark.parametrize("value", NO_PATH)
def test_paths_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    for name in ("COMFYUI_PATH", "COMFYUI_OLDEST_PATH", "COMFYUI_OLDEST_PYTHON"):
        monkeypatch.setenv(name, str(folder / "comfyui"))
    comfyui(folder / "comfyui")
    monkeypatch.setenv(variable, value)
    call = find_comfyui.find_comfyui if variable == "COMFYUI_PATH" else lambda: find_oldest(None)
    refused(call, variable, value[:100], error=Stop)


@pytest.mark.parametrize("value", ["~nobodyhere/x", "a" * 5000, "loop", "file", "full", "/proc/1/x"])
def test_the_virtual_environment_is_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """An environment is made with what lies in its folder removed: never where that was something else."""
    (folder / "full").mkdir()
    (folder / "full/thesis.txt").write_text("mine")
    monkeypatch.setenv("FEEDFACE_VENV", value)
    monkeypatch.setattr(environment.sys, "executable", "/bin/false")
    refused(lambda: Environment(environment_folder()).create(), value[:100], error=Stop)
    assert (folder / "full/thesis.txt").read_text() == (folder / "file").read_text() == "mine"


@pytest.mark.parametrize("stamps", ["[]", "5", "null", "{", "[" * 100_000, "\ufffd"])
def test_stamps_that_are_none(folder: Path, stamps: str) -> None:
    found = Environment(folder)
    found.stamps_file.write_text(stamps, encoding="utf-8")
    assert found.stamps() == {} and not found.stamped("queue", "x")
    found.stamp("queue", "x")
    assert found.stamped("queue", "x")


def test_an_environment_that_cannot_be_written_or_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Environment(folder / "file")
    found.stamp("queue", "x")
    assert str(found.stamps_file) in capsys.readouterr().out
    found.python = Path("/bin/false")
    refused(lambda: found.ask("print(1)"), found.folder, error=Stop)
    found.python = Path("/bin/echo")
    refused(lambda: found.ask("print(1)"), found.folder, error=Stop)


@pytest.mark.parametrize("version", [b"", b'__version__ = "\xff\xfe"', b"\0" * 99, b'"' + b"9" * 9999 + b'"'])
def test_a_comfyui_without_a_version_is_too_old(folder: Path, monkeypatch, version: bytes) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui(folder / "comfyui", version)))
    assert version_of(folder / "comfyui") == version_of(folder) == "0"
    refused(find_comfyui.find_comfyui, folder / "comfyui", "too old", error=Stop)


def test_requirements_that_cannot_be_read(folder: Path) -> None:
    (folder / "binary.txt").write_bytes(b"\xff\xfe\0")
    for name in ("nowhere.txt", "binary.txt", "loop", "."):
        refused(lambda name=name: read_requirements(folder / name), folder / name, error=Stop)


@pytest.mark.parametrize("text", NO_WHOLE)
def test_whole_numbers_of_options(text: str) -> None:
    refused(lambda: whole(1, 10)(text), "from 1 to 10", error=argparse.ArgumentTypeError)


@pytest.mark.parametrize("text", NO_NUMBER)
def test_numbers_of_options(text: str) -> None:
    refused(lambda: number(0, 10, above=True)(text), "above 0, at most 10", error=argparse.ArgumentTypeError)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--seeds", value) for value in ("x", "-1", "1_0", str(2**64), "")),
        *(("--attempts", value) for value in ("0", "1e3", "9" * 5000)),
        *(("--patience", value) for value in ("nan", "-1", "inf")),
        *(("--timeout", value) for value in ("0", "nan", "-5", "inf")),
        ("--mark", "yes"),
    ],
)
def test_options_of_the_queue(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        queue(["tasks.json", "--workflow", "flow.json", f"{option}={value}"])
    assert option in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "x"],
        ["--set", "a.b=1", "--set", "a.b=2"],
        ["--prompt-node", " "],
        ["--photo-node", ""],
        ["--seed-node", ""],
    ],
)
def test_places_of_the_queue(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert queue(["tasks.json", "--workflow", "flow.json", *words]) == 1
    said = capsys.readouterr().err
    assert words[0] in said and "there is no such file" not in said
    assert not (folder / "queue_output").exists()
