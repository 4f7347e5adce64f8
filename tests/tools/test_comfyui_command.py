"""What ``python run.py comfyui`` and ``demo`` do before and around the server."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tools import comfyui, demo
from tools.find_comfyui import COMFYUI_RELEASE
from tools.server import ServerError, free_port

ROOT = Path(__file__).resolve().parents[2]
#: In the place of ComfyUI's: listens where it is told for a moment, or prints its help.
MAIN = """
import argparse, socket
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--listen")
options, rest = parser.parse_known_args()
print("arguments:", *rest)
host = options.listen.split(",")[0]
server = socket.create_server((host, options.port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
server.settimeout(20)
server.accept()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that passes for ComfyUI, with :data:`MAIN`, and a place of its own for what the command writes."""
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "comfy/model_patcher.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{COMFYUI_RELEASE}"\n')
    (folder / "main.py").write_text(MAIN)
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    monkeypatch.setattr(comfyui, "ROOT", tmp_path / "pack")
    return folder


def test_people_lie_in_the_input_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people = tmp_path / "pack/models/feedface_small/people"
    people.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(people / "feedface_person1_1.png")
    (people / "people.json").write_text("[]")
    monkeypatch.setattr(comfyui, "ROOT", tmp_path / "pack")
    for _ in range(2):  # started again, it finds them there
        comfyui.lay_out_people(tmp_path / "base/input")
    assert [path.name for path in (tmp_path / "base/input").iterdir()] == ["feedface_person1_1.png"]


@pytest.mark.parametrize(
    ("listen", "host"),
    [
        ([], "127.0.0.1"),
        (["--listen"], "127.0.0.1"),
        (["--listen=0.0.0.0"], "127.0.0.1"),
        (["--listen", "::1"], "[::1]"),
    ],
)
def test_waits_where_it_was_told_to_listen(
    stand_in: Path, capfd: pytest.CaptureFixture[str], listen: list[str], host: str
) -> None:
    port = free_port()
    assert comfyui.main([*listen, "--port", str(port), "--cpu"]) == 0
    out = capfd.readouterr().out
    assert f"is at http://{host}:{port} " in out and "arguments: " in out and "--cpu" in out


def test_a_port_that_is_taken_is_refused_at_once(stand_in: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(ServerError, match=f"port {other.getsockname()[1]} .* is taken"):
            comfyui.main([f"--port={other.getsockname()[1]}", "--cpu"])


def test_a_base_directory_of_another_is_refused(stand_in: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="--base-directory: this command has its own"):
        comfyui.main(["--base-directory", str(tmp_path)])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["comfyui", "--cpu", "--help"], "--listen"),
        (["comfyui", "-h"], "The arguments of .*ComfyUI"),
        (["demo", "--help"], "The face at work"),
        (["queue", "--help"], "prompts × people, on one ComfyUI or several"),
        (["bench", "identity", "--help"], "published comparisons"),
        (["test", "-h"], "pytest arguments"),
    ],
)
def test_help_makes_no_environment(stand_in: Path, tmp_path: Path, command: list[str], said: str) -> None:
    variables = os.environ | {"FEEDFACE_VENV": str(tmp_path / "venv")}
    answer = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *command],
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    assert answer.returncode == 0 and re.search(said, answer.stdout), answer.stdout
    assert not (tmp_path / "venv").exists()


def test_a_photograph_without_a_model_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for arguments, said in (
        (["--photo", "me.jpg"], "needs a model: give --checkpoint and --adapter"),
        (["--checkpoint", str(tmp_path / "absent.safetensors"), "--adapter", "a"], "there is no file .*absent"),
    ):
        monkeypatch.setattr(sys, "argv", ["demo", *arguments])
        with pytest.raises(SystemExit, match=said):
            demo.main()
