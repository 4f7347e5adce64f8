"""Fixtures shared by all tests: a real ComfyUI, in this process or to start a server of, and photographs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tools.find_comfyui import COMFYUI_OLDEST, find_comfyui, find_oldest, version_of
from tools.server import ComfyServer

# The models of the tests are tiny: more threads would only wait for one another, and for the servers beside them.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
PACK = "feedface_pack"  # the name our pack is imported under; ComfyUI itself uses the folder's absolute path
ABSENT = "needs ComfyUI"  # starts the reason of every test skipped for want of one


@dataclass(frozen=True)
class Installation:
    """A ComfyUI and the interpreter that runs it."""

    path: Path
    python: Path
    version: str


@dataclass(frozen=True)
class InProcess:
    """ComfyUI imported into this process, on the CPU, with our pack loaded the way ComfyUI loads it."""

    path: Path
    version: str
    pack: ModuleType

    def module(self, name: str) -> ModuleType:
        """A module of the pack, such as ``nodes.apply`` or ``feedface_core.config``: the pack's own copy."""
        return importlib.import_module(f"{PACK}.{name}")


def absent(what: str) -> None:
    if os.environ.get("FEEDFACE_REQUIRE_COMFYUI") == "1":
        pytest.fail(f"FEEDFACE_REQUIRE_COMFYUI=1, but {what} was not found")
    pytest.skip(f"{ABSENT}: {what} was not found")


@pytest.fixture(scope="session")
def newest_comfyui() -> Installation:
    folder = find_comfyui()
    if folder is None:
        absent("ComfyUI")
    return Installation(folder, Path(sys.executable), version_of(folder))


@pytest.fixture(scope="session")
def oldest_comfyui() -> Installation:
    found = find_oldest(find_comfyui())
    if found is None or not found[1].exists():
        absent(f"ComfyUI {COMFYUI_OLDEST}" if found is None else f"its interpreter {found[1]}")
    return Installation(*found, version_of(found[0]))


@pytest.fixture(scope="session", params=["newest", "oldest"])
def any_comfyui(request: pytest.FixtureRequest) -> Installation:
    """Each ComfyUI we promise to work in, one after the other."""
    return request.getfixturevalue(f"{request.param}_comfyui")


@pytest.fixture(scope="session")
def comfy(newest_comfyui: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """ComfyUI in this process. Import its modules inside the test, after this fixture has set the path.

    ComfyUI's folder comes first: its ``nodes.py`` and our ``nodes/`` share a name.
    """
    base = tmp_path_factory.mktemp("comfyui")
    sys.path.insert(0, str(newest_comfyui.path))
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(base)
    args.database_url = "sqlite:///:memory:"
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = pack
    spec.loader.exec_module(pack)
    yield InProcess(newest_comfyui.path, newest_comfyui.version, pack)
    sys.path.remove(str(newest_comfyui.path))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like ComfyUI's ``models``, with random weights.

    ``checkpoints/tiny_sd1.safetensors`` is Stable Diffusion 1.x, ``feedface/tiny_sd1.safetensors`` an adapter for it.
    """
    from tools.tiny_checkpoint import write_adapter, write_checkpoint

    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "checkpoints/tiny_sd1.safetensors")
    write_adapter(folder / "feedface/tiny_sd1.safetensors")
    return folder


@pytest.fixture(scope="session")
def server(any_comfyui: Installation, tiny_models: Path) -> Iterator[ComfyServer]:
    """A running server, one for each ComfyUI, with this pack and the tiny models; shared by all tests that need one."""
    with ComfyServer(any_comfyui.path, any_comfyui.python, model_folders=tiny_models) as running:
        yield running


@pytest.fixture(scope="session")
def shared_faces() -> Path:
    """A folder of photographs, several of each person, named ``<person>_<n>.jpg``."""
    folder = Path(os.environ.get("FEEDFACE_FACES") or ROOT.parent / "shared/faces")
    if not any(folder.glob("*_*.jpg")):
        pytest.skip(f"no photographs <person>_<n>.jpg in {folder}; FEEDFACE_FACES names another folder")
    return folder


@pytest.fixture
def astronaut() -> torch.Tensor:
    """A public-domain portrait, in ComfyUI's image form: ``(1, 512, 512, 3)``, floats 0 to 1."""
    data = pytest.importorskip("skimage.data")
    return torch.from_numpy(data.astronaut().copy()).float().div_(255).unsqueeze(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # after everything else that is summed up
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if ABSENT in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} TESTS SKIPPED FOR WANT OF COMFYUI: set COMFYUI_PATH, and COMFYUI_OLDEST_PATH "
            f"for {COMFYUI_OLDEST} (or a folder ComfyUI-{COMFYUI_OLDEST} beside ComfyUI). "
            "FEEDFACE_REQUIRE_COMFYUI=1 makes this a failure.",
            red=True,
            bold=True,
        )
