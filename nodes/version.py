"""The oldest ComfyUI that the nodes run on. Imports nothing that an older one lacks."""

from __future__ import annotations

import importlib.util
import re

OLDEST = "0.3.75"  # equals requires-comfyui in pyproject.toml


def check_version() -> None:
    """Raises ``ImportError`` with the version needed and the version found, in a ComfyUI that is too old.

    One that does not tell its version, as some forks, is taken for new enough when it has the interface for nodes.
    """
    try:
        from comfyui_version import __version__ as found
    except ImportError:
        found = ""
    if _numbers(found) < _numbers(OLDEST) if found else importlib.util.find_spec("comfy_api") is None:
        raise ImportError(
            f"FeedFace needs ComfyUI {OLDEST} or newer, and this is {found or 'an older one'}: update ComfyUI."
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
