"""Where ComfyUI is on this machine, or how to get it. Python's standard library only."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMFYUI_RELEASE = "0.33.0"  # fetched where no ComfyUI is found
COMFYUI_OLDEST = "0.3.75"  # equals requires-comfyui in pyproject.toml
COMFYUI_REPOSITORY = "https://github.com/Comfy-Org/ComfyUI"
WINDOWS = os.name == "nt"


class Stop(Exception):
    """A problem the user can mend; printed without a traceback."""


def say(text: str) -> None:
    print(f"FeedFace: {text}", flush=True)


def environment_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if WINDOWS else "bin/python")


def version_of(comfyui: Path) -> str:
    """The release number; a version file that cannot be read counts as 0, too old."""
    found = re.search(r'"([\d.]+)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))
    return found.group(1) if found else "0"


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def is_comfyui(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("main.py", "comfyui_version.py", "comfy/model_patcher.py"))


def cache_folder() -> Path:
    if WINDOWS:
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "feedface"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/feedface"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "feedface"


def comfy_cli_workspaces() -> list[Path]:
    """The workspaces in comfy-cli's settings, then the folder it installs to when told nothing."""
    home = Path.home()
    if WINDOWS:
        settings, default = home / "AppData/Local/comfy-cli", home / "Documents/comfy/ComfyUI"
    elif sys.platform == "darwin":
        settings, default = home / "Library/Application Support/comfy-cli", home / "Documents/comfy/ComfyUI"
    else:
        settings, default = home / ".config/comfy-cli", home / "comfy/ComfyUI"
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read(settings / "config.ini", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        pass  # somebody else's file: a broken one is as good as none
    named = (config.defaults().get(key) for key in ("default_workspace", "recent_workspace"))
    return [Path(folder) for folder in named if folder] + [default]


def find_comfyui() -> Path | None:
    """The ComfyUI on this machine, or None.

    Raises:
        Stop: ``COMFYUI_PATH`` is set and holds no ComfyUI, or one older than we support.
    """
    given = os.environ.get("COMFYUI_PATH")
    if given:
        places = [Path(given).expanduser().absolute()]
        if not is_comfyui(places[0]):
            raise Stop(f"COMFYUI_PATH is {given}, but no ComfyUI is there (a folder with main.py and comfy/).")
    else:
        installed_in = ROOT.parent.parent  # ComfyUI/custom_nodes/<this pack>
        places = [installed_in] if ROOT.parent.name == "custom_nodes" else []
        places += [*comfy_cli_workspaces(), cache_folder() / f"ComfyUI-{COMFYUI_RELEASE}"]
    for place in places:
        if is_comfyui(place):
            version = version_of(place)
            if numbers(version) < numbers(COMFYUI_OLDEST):
                raise Stop(
                    f"ComfyUI {version} in {place} is too old: FeedFace needs {COMFYUI_OLDEST} or newer.\n"
                    "Update it, or point COMFYUI_PATH at a newer one."
                )
            return place
    return None


def fetch_comfyui() -> Path:
    """Fetch the pinned release into our cache folder, with git or else as an archive.

    Raises:
        Stop: it cannot be reached.
    """
    target = cache_folder() / f"ComfyUI-{COMFYUI_RELEASE}"
    say(f"no ComfyUI found: fetching {COMFYUI_RELEASE} into {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fetched = Path(folder) / "ComfyUI"
        try:
            if shutil.which("git"):
                command = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{COMFYUI_RELEASE}"]
                quiet = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
                subprocess.run(
                    [*command, "-c", "advice.detachedHead=false", COMFYUI_REPOSITORY, str(fetched)],
                    check=True,
                    env=quiet,
                    stdin=subprocess.DEVNULL,
                    timeout=900,
                )
            else:
                archive = Path(folder) / "release.zip"
                address = f"{COMFYUI_REPOSITORY}/archive/refs/tags/v{COMFYUI_RELEASE}.zip"
                with urllib.request.urlopen(address, timeout=60) as answer, archive.open("wb") as file:
                    shutil.copyfileobj(answer, file)
                zipfile.ZipFile(archive).extractall(folder)
                (Path(folder) / f"ComfyUI-{COMFYUI_RELEASE}").rename(fetched)
        except (OSError, subprocess.SubprocessError, zipfile.BadZipFile) as problem:
            raise Stop(
                f"no ComfyUI on this machine, and it could not be fetched ({type(problem).__name__}).\n"
                f"Install it ({COMFYUI_REPOSITORY}, or `pip install comfy-cli` and `comfy install`)\n"
                "or set COMFYUI_PATH to the folder that holds its main.py."
            ) from problem
        fetched.rename(target)
    return target


def find_oldest(comfyui: Path | None) -> tuple[Path, Path] | None:
    """The oldest supported ComfyUI and the interpreter that runs it, or None; makes nothing.

    Raises:
        Stop: ``COMFYUI_OLDEST_PATH`` is set and holds no ComfyUI.
    """
    given = os.environ.get("COMFYUI_OLDEST_PATH")
    if given:
        folder = Path(given).expanduser().absolute()
        if not is_comfyui(folder):
            raise Stop(f"COMFYUI_OLDEST_PATH is {given}, but no ComfyUI is there (a folder with main.py and comfy/).")
    elif comfyui and is_comfyui(comfyui.parent / f"ComfyUI-{COMFYUI_OLDEST}"):
        folder = comfyui.parent / f"ComfyUI-{COMFYUI_OLDEST}"
    else:
        return None
    python = os.environ.get("COMFYUI_OLDEST_PYTHON")
    return folder, Path(python).expanduser() if python else environment_python(folder / ".venv")
