"""Loaded by a ComfyUI that is too old, the pack says so in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.find_comfyui import COMFYUI_OLDEST

ROOT = Path(__file__).resolve().parents[1]
#: As ComfyUI loads a folder of custom_nodes.
LOAD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", {str(ROOT / "__init__.py")!r})
module = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def load_in(folder: Path, version: str | None, api: bool) -> str:
    """The last line that Python prints when the pack is imported beside a ComfyUI of this version."""
    if version:
        (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    if api:
        (folder / "comfy_api").mkdir()
        (folder / "comfy_api/latest.py").write_text("class ComfyExtension: pass\nio = None\n")
    loading = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        text=True,
        stderr=subprocess.PIPE,
    )
    assert loading.returncode
    return loading.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("version", "api", "found"),
    [("0.3.40", False, "0.3.40"), ("0.3.74", True, "0.3.74"), (None, False, "an older one")],
)
def test_the_version_needed_and_the_version_found(tmp_path: Path, version: str | None, api: bool, found: str) -> None:
    said = load_in(tmp_path, version, api)
    needed = f"FeedFace needs ComfyUI {COMFYUI_OLDEST} or newer"
    assert said == f"ImportError: {needed}, and this is {found}: update ComfyUI."


@pytest.mark.parametrize("version", [COMFYUI_OLDEST, "0.4.0", "1.0", "0.33.0+local", None])
def test_a_newer_one_or_a_fork_is_not_refused(tmp_path: Path, version: str | None) -> None:
    """This stand-in has nothing but the interface for nodes, so that something else is missed."""
    assert "folder_paths" in load_in(tmp_path, version, api=True)
