"""The tests of the nodes once more, inside the oldest ComfyUI we support, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NODES = "tests/nodes"
CONTRACTS = [f"{NODES}/test_{name}.py" for name in ("contracts", "prompts", "guider", "files_and_faces")]


@pytest.mark.parametrize("chosen", [
    pytest.param(CONTRACTS, id="contracts"),
    pytest.param([NODES], id="all", marks=pytest.mark.slow),
])
def test_node_tests_pass_in_the_oldest_comfyui(newest_comfyui, oldest_comfyui, chosen: list[str]) -> None:
    if newest_comfyui.version == oldest_comfyui.version:
        pytest.skip("this is the oldest")
    tests = subprocess.run(
        [str(oldest_comfyui.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
        cwd=ROOT,
        env=os.environ | {"COMFYUI_PATH": str(oldest_comfyui.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    passed = re.search(r"(\d+) passed", tests.stdout.splitlines()[-1])
    assert tests.returncode == 0 and passed and int(passed.group(1)) > 20, tests.stdout[-6000:]
