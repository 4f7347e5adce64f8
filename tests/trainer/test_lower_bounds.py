"""The lowest versions that pyproject.toml allows, all of them together, do what the newest do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.small_training import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.version_info >= (3, 12), reason="the lowest versions were built for Python up to 3.11"),
]


def lower_bounds() -> dict[str, str]:
    """Lowest version by name, of what the nodes and the trainer need; torch and what goes with it have none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["train"]])
    bounds = {one.name: [part.version for part in one.specifier if part.operator == ">="] for one in required}
    assert [name for name, found in bounds.items() if not found] == ["torchvision"]
    return {name: found[0] for name, found in bounds.items() if found}


def run(*command: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def lowest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the lowest versions; the rest, torch above all, comes from this one."""
    folder = tmp_path_factory.mktemp("lowest") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    # Its folder comes after the environment's own on the path, and pip takes what it finds there for installed.
    (Path(own) / "the_rest.pth").write_text(sysconfig.get_paths()["purelib"])
    run(python, "-m", "pip", "install", "--quiet", *(f"{name}=={bound}" for name, bound in lower_bounds().items()))
    return python


def test_they_are_the_ones_in_use(lowest):
    code = "import json, sys; from importlib.metadata import version; print(json.dumps([*map(version, sys.argv[1:])]))"
    bounds = lower_bounds()
    found = json.loads(run(lowest, "-c", code, *bounds))
    assert dict(zip(bounds, map(Version, found), strict=True)) == {name: Version(own) for name, own in bounds.items()}


def test_the_trainer_passes_its_tests(lowest):
    told = run(lowest, "-m", "pytest", "-q", "-x", "tests/trainer")
    assert " passed" in told and "failed" not in told.splitlines()[-1]
