"""The pack as ComfyUI-Manager installs it: requirements into ComfyUI's environment, the files into ``custom_nodes``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from feedface_core.files.provenance import SOURCE_TYPES, source_type
from tools.server import ComfyServer
from tools.templates import LIST
from tools.templates.__main__ import PEOPLE

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a download of the repository holds: no environment, no caches, no history."""
    folder = tmp_path_factory.mktemp("download") / "comfyui-feedface"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone of the repository")
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def test_requirements_leave_torch_alone(pack: Path, tmp_path: Path) -> None:
    """In this environment everything is there; what pip would replace is listed with its name."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(report)]
    done = subprocess.run([*command, "-r", str(pack / "requirements.txt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named = {one["metadata"]["name"].lower() for one in json.loads(report.read_text("utf-8"))["install"]}
    assert named <= {"facenet-pytorch"}, named


def test_nodes_are_listed_and_a_template_runs(any_comfyui, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.server.ROOT", pack)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    expected = set(json.loads((pack / "locales/en/nodeDefs.json").read_text("utf-8")))
    template = next(one for one in LIST if one.key == "feedface_small")
    with ComfyServer(any_comfyui.path, any_comfyui.python) as server:
        assert "IMPORT FAILED" not in server.log
        assert {key for key in server.object_info() if key.startswith("FeedFace")} == expected
        prompt = json.loads(template.api.read_text("utf-8"))
        for node in prompt.values():
            if node["class_type"] == "LoadImage":
                server.upload(PEOPLE / node["inputs"]["image"])
        run = server.run(prompt)
        files = [
            file for output in run.outputs.values() for file in output.get("images", []) if file["type"] == "output"
        ]
        assert len(files) == 2
        for file in files:
            picture = server.request("GET", "/view", params=file).content
            assert source_type(picture) == SOURCE_TYPES["generated"]
