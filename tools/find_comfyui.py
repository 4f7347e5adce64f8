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
    try:
        text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r'"([0-9.]{1,40})"', text)
    return found.group(1) if found else "0"


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".") if number.isdigit())


def is_comfyui(folder: Path) -> bool:
    # os.path: a path that is too long for the system is no ComfyUI, and no error.
    return all(os.path.isfile(folder / name) for name in ("main.py", "comfyui_version.py", "comfy/model_patcher.py"))


def cache_folder() -> Path:
    if WINDOWS:
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "feedface"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/feedface"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "feedface"


def comfy_cli_workspaces() -> list[Path]:
    """The workspaces in comfy-cli's settings, then the folder it installs to when told nothing."""
    home, default = Path.home(), "Documents/comfy/ComfyUI"
    if WINDOWS:
        settings = home / "AppData/Local/comfy-cli"
    elif sys.platform == "darwin":
        settings = home / "Library/Application Support/comfy-cli"
    else:
        settings, default = home / ".config/comfy-cli", "comfy/ComfyUI"
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read(settings / "config.ini", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        pass  # somebody else's file: a broken one is as good as none
    named = (config.defaults().get(key) for key in ("default_workspace", "recent_workspace"))
    return [*(Path(folder) for folder in named if folder), home / default]


def named_path(variable: str, value: str) -> Path:
    """A path that an environment variable holds. Raises ``Stop`` if there is no such user's home folder."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise Stop(
            f"{variable} is {value[:400]}, but there is no such user's home folder: write the path out."
        ) from None


def named_folder(variable: str) -> Path | None:
    """The ComfyUI that an environment variable names; None where it is not set. Raises ``Stop`` if none is there."""
    value = os.environ.get(variable)
    if not value:
        return None
    folder = named_path(variable, value).absolute()
    if not is_comfyui(folder):
        raise Stop(f"{variable} is {value[:400]}, but no ComfyUI is there (a folder with main.py and comfy/).")
    return folder


def find_comfyui() -> Path | None:
    """The ComfyUI on this machine, or None.

    Raises:
        Stop: ``COMFYUI_PATH`` is set and holds no ComfyUI, or the one that is found is older than we support.
    """
    named = named_folder("COMFYUI_PATH")
    # ComfyUI/custom_nodes/<this pack>
    folders = [named] if named else [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    folders += [] if named else [*comfy_cli_workspaces(), cache_folder() / f"ComfyUI-{COMFYUI_RELEASE}"]
    found = next(filter(is_comfyui, folders), None)
    if found and numbers(version_of(found)) < numbers(COMFYUI_OLDEST):
        raise Stop(
            f"ComfyUI {version_of(found)} in {found} is too old: FeedFace needs {COMFYUI_OLDEST} or newer.\n"
            "Update it, or point COMFYUI_PATH at a newer one."
        )
    return found


def fetch_comfyui() -> Path:
    """Fetch the pinned release into our cache folder, with git or else as an archive.

    Raises:
        Stop: it cannot be reached.
    """
    target, tag = cache_folder() / f"ComfyUI-{COMFYUI_RELEASE}", f"v{COMFYUI_RELEASE}"
    say(f"no ComfyUI found: fetching {COMFYUI_RELEASE} into {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise Stop(f"{target.parent}: cannot be made ({problem.strerror}): set COMFYUI_PATH to a ComfyUI.") from problem
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fetched = Path(folder) / target.name  # as the archive calls it
        try:
            if shutil.which("git"):
                command = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1"]
                command += ["--branch", tag, COMFYUI_REPOSITORY, str(fetched)]
                quiet = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
                subprocess.run(command, check=True, env=quiet, stdin=subprocess.DEVNULL, timeout=900)
            else:
                archive = Path(folder) / "release.zip"
                address = f"{COMFYUI_REPOSITORY}/archive/refs/tags/{tag}.zip"
                with urllib.request.urlopen(address, timeout=60) as answer, archive.open("wb") as file:
                    shutil.copyfileobj(answer, file)
                zipfile.ZipFile(archive).extractall(folder)
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
        Stop: ``COMFYUI_OLDEST_PATH`` is set and holds no ComfyUI, or ``COMFYUI_OLDEST_PYTHON`` is no program.
    """
    beside = comfyui.parent / f"ComfyUI-{COMFYUI_OLDEST}" if comfyui else None
    folder = named_folder("COMFYUI_OLDEST_PATH") or (beside if beside and is_comfyui(beside) else None)
    if folder is None:
        return None
    python = os.environ.get("COMFYUI_OLDEST_PYTHON")
    if not python:
        return folder, environment_python(folder / ".venv")
    program = named_path("COMFYUI_OLDEST_PYTHON", python)
    if not (os.path.isfile(program) and os.access(program, os.X_OK)):
        raise Stop(f"COMFYUI_OLDEST_PYTHON is {python[:400]}, but that is no program: name a Python interpreter.")
    return folder, program
