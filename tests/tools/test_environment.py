"""Which torch run.py installs where none is: built for the machine, unless the user says otherwise."""

from __future__ import annotations

import io
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tools import environment
from tools.environment import TORCH, TORCH_INDEX, torch_arguments

NOTHING = dict.fromkeys(("torch", "torchvision", "torchaudio"))


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux machine whose programs are those in an empty folder, and whose network reaches everything."""
    monkeypatch.delenv("FEEDFACE_TORCH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "DRIVER", tmp_path / "gpus")
    monkeypatch.setattr(environment, "WINDOWS", False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: io.BytesIO())
    return tmp_path


def add_gpu(folder: Path, answer: str = "GPU 0: NVIDIA (UUID: GPU-1)", code: int = 0) -> None:
    """The driver's program, which lists the GPUs or fails."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    program.chmod(0o755)


def build(arguments: list[str]) -> str:
    """The build asked for, and that nothing else than the rest of the arguments is."""
    if "--extra-index-url" not in arguments:
        return ""
    assert arguments[0] == "--extra-index-url"
    return arguments[1].rsplit("/", 1)[1]


@pytest.mark.skipif(os.name == "nt", reason="the stand-in of the driver's program is a shell script")
@pytest.mark.parametrize(
    ("platform", "without", "with_gpu"), [("linux", "cpu", ""), ("windows", "", "cu130"), ("darwin", "", "")]
)
def test_build_is_chosen_by_the_machine(
    machine: Path, monkeypatch: pytest.MonkeyPatch, platform: str, without: str, with_gpu: str
) -> None:
    monkeypatch.setattr(environment, "WINDOWS", platform == "windows")
    monkeypatch.setattr(sys, "platform", platform)
    assert build(torch_arguments(NOTHING)) == without
    add_gpu(machine, "NVIDIA-SMI has failed because it couldn't communicate with the driver", code=9)
    assert build(torch_arguments(NOTHING)) == without
    add_gpu(machine)
    arguments = torch_arguments(NOTHING)
    assert build(arguments) == with_gpu and arguments[-3:] == TORCH.split()
    (machine / "nvidia-smi").unlink()
    (machine / "gpus/0000:01:00.0").mkdir(parents=True)
    assert build(torch_arguments(NOTHING)) == with_gpu


def test_the_user_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEEDFACE_TORCH", "--index-url https://example.org torch torchvision")
    assert torch_arguments(NOTHING) == ["--index-url", "https://example.org", "torch", "torchvision"]
    assert torch_arguments(NOTHING | {"torch": "2.14.1+cpu"})[-2:] == ["torch", "torchvision"]


def test_what_is_added_is_of_the_build_that_is_there() -> None:
    for version, expected in (("2.14.1+cu126", "cu126"), ("2.14.1+cpu", "cpu"), ("2.14.1", "")):
        arguments = torch_arguments(NOTHING | {"torch": version, "torchaudio": "2.11.0"})
        assert build(arguments) == expected and arguments[-1] == "torchvision"
        assert "torchaudio" not in arguments and "torch" not in arguments


def test_an_index_that_cannot_be_reached_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(address: str, timeout: float) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert torch_arguments(NOTHING) == TORCH.split()
    assert f"{TORCH_INDEX}/cpu cannot be reached" in capsys.readouterr().out


def test_the_queue_needs_no_torch(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packages are installed once, and not at all where everything is."""
    installed: list[list[str]] = []
    monkeypatch.setenv("FEEDFACE_VENV", str(machine / "venv"))
    monkeypatch.setattr(environment.Environment, "create", lambda self: self.folder.mkdir(exist_ok=True))
    monkeypatch.setattr(environment.Environment, "pip", lambda self, what, arguments: installed.append(arguments))
    monkeypatch.setattr(environment, "environment_python", lambda folder: Path(sys.executable))
    for _ in range(2):
        environment.prepare_queue()
    (lines,) = installed
    assert {re.split("[>=]", line)[0] for line in lines} == {
        "pillow",
        "pydantic",
        "requests",
        "tqdm",
        "websocket-client",
    }
    project = (environment.ROOT / "pyproject.toml").read_text("utf-8")
    (machine / "venv/feedface-stamps.json").unlink()
    environment.Environment(machine / "venv").stamp("feedface", project, *environment.EXTRAS)
    environment.prepare_queue()
    assert len(installed) == 1
