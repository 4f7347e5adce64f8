"""What the Comfy registry reads: addresses that follow one constant, and files that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tools.registry import REPOSITORY, addresses, rewritten

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]


def test_addresses_follow_the_constant() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert rewritten(text, REPOSITORY) == text, "run python -m tools.registry"
    other = tomllib.loads(rewritten(text, "https://github.com/someone/elsewhere", "someone"))
    everything = [*other["project"]["urls"].values(), other["tool"]["comfy"]["Icon"], other["tool"]["comfy"]["Banner"]]
    assert all("/someone/elsewhere" in address for address in everything) and len(everything) == len(addresses(""))
    assert other["tool"]["comfy"]["PublisherId"] == "someone"


def test_pictures_behind_raw_addresses_exist() -> None:
    raw = [address for address in addresses(REPOSITORY).values() if "raw.githubusercontent.com" in address]
    assert len(raw) == 2
    for address in raw:
        path = ROOT / re.sub(r"https://[^/]+/[^/]+/[^/]+/main/", "", address)
        assert path.stat().st_size > 200


def test_banner_has_the_shape_that_the_registry_shows() -> None:
    from PIL import Image

    with Image.open(ROOT / "assets/banner.png") as banner:
        assert abs(banner.width / banner.height - 21 / 9) < 0.02 and banner.width >= 1000


def test_changelog_has_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"\n## {project['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
