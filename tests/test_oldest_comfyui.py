"""The tests of the nodes once more, inside the oldest ComfyUI we support, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_node_tests_pass_in_the_oldest_comfyui(newest_comfyui, oldest_comfyui) -> None:
    if newest_comfyui.version == oldest_comfyui.version:
        pytest.skip("this is the oldest")
    tests = subprocess.run(
        [str(oldest_comfyui.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/nodes"],
        cwd=ROOT,
        env=os.environ | {"COMFYUI_PATH": str(oldest_comfyui.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    passed = re.search(r"(\d+) passed", tests.stdout.splitlines()[-1])
    assert tests.returncode == 0 and passed and int(passed.group(1)) > 20, tests.stdout[-6000:]
