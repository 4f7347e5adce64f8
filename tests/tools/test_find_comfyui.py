"""Where run.py looks for ComfyUI, and what it says when there is none or a wrong one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import find_comfyui
from tools.find_comfyui import COMFYUI_OLDEST, COMFYUI_RELEASE, Stop


def make_comfyui(folder: Path, version: str = COMFYUI_RELEASE) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfy/model_patcher.py").touch()
    (folder / "comfyui_version.py").write_text(f'# made by the build\n__version__ = "{version}"\n')
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any ComfyUI."""
    for name in ("COMFYUI_PATH", "COMFYUI_OLDEST_PATH", "COMFYUI_OLDEST_PYTHON", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(find_comfyui, "ROOT", tmp_path / "checkout")
    return tmp_path


def settings(home: Path) -> Path:
    if sys.platform == "darwin":
        return home / "Library/Application Support/comfy-cli"
    return home / ("AppData/Local/comfy-cli" if sys.platform == "win32" else ".config/comfy-cli")


def test_none_on_the_machine() -> None:
    assert find_comfyui.find_comfyui() is None
    assert find_comfyui.find_oldest(None) is None


def test_order_of_places(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place found later in this test comes before those found earlier."""
    cached = make_comfyui(find_comfyui.cache_folder() / f"ComfyUI-{COMFYUI_RELEASE}")
    assert find_comfyui.find_comfyui() == cached
    default = make_comfyui(find_comfyui.comfy_cli_workspaces()[-1])
    assert find_comfyui.find_comfyui() == default
    chosen = make_comfyui(home / "elsewhere/ComfyUI")
    settings(home).mkdir(parents=True)
    (settings(home) / "config.ini").write_text(f"[DEFAULT]\ndefault_workspace = {chosen}\n")
    assert find_comfyui.find_comfyui() == chosen
    around = make_comfyui(home / "around")
    monkeypatch.setattr(find_comfyui, "ROOT", around / "custom_nodes/ComfyUI-FeedFace")
    assert find_comfyui.find_comfyui() == around
    named = make_comfyui(home / "named")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert find_comfyui.find_comfyui() == named


def test_broken_settings_of_comfy_cli_are_ignored(home: Path) -> None:
    settings(home).mkdir(parents=True)
    (settings(home) / "config.ini").write_text("not an ini file")
    assert find_comfyui.find_comfyui() is None


def test_wrong_path_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(home))
    with pytest.raises(Stop, match="COMFYUI_PATH is .* no ComfyUI is there"):
        find_comfyui.find_comfyui()
    monkeypatch.setenv("COMFYUI_OLDEST_PATH", str(home))
    with pytest.raises(Stop, match="COMFYUI_OLDEST_PATH is .* no ComfyUI is there"):
        find_comfyui.find_oldest(None)


@pytest.mark.parametrize(("version", "accepted"), [("0.3.74", False), (COMFYUI_OLDEST, True), ("0.33.0", True)])
def test_version_is_compared_by_number(home: Path, version: str, accepted: bool) -> None:
    folder = make_comfyui(find_comfyui.comfy_cli_workspaces()[-1], version)
    if accepted:
        assert find_comfyui.find_comfyui() == folder
    else:
        with pytest.raises(Stop, match=f"ComfyUI {version} in .* too old: FeedFace needs {COMFYUI_OLDEST}"):
            find_comfyui.find_comfyui()


def test_oldest_lies_beside_comfyui(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = make_comfyui(home / "ComfyUI")
    assert find_comfyui.find_oldest(newest) is None
    oldest = make_comfyui(home / f"ComfyUI-{COMFYUI_OLDEST}", COMFYUI_OLDEST)
    folder, python = find_comfyui.find_oldest(newest)
    assert folder == oldest and python.is_relative_to(oldest / ".venv")
    monkeypatch.setenv("COMFYUI_OLDEST_PYTHON", sys.executable)
    assert find_comfyui.find_oldest(newest) == (oldest, Path(sys.executable))


def test_fetching_without_a_network_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_comfyui, "COMFYUI_REPOSITORY", (home / "no-such-repository").as_uri())
    with pytest.raises(Stop, match="could not be fetched.*(?s:.)*COMFYUI_PATH"):
        find_comfyui.fetch_comfyui()
    assert not (find_comfyui.cache_folder() / f"ComfyUI-{COMFYUI_RELEASE}").exists()
