"""A real browser before a real server: newest and oldest ComfyUI, nodes on the canvas and in Nodes 2.0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from tools.browser import Frontend, find_chromium, open_browser
from tools.server import ComfyServer
from tools.templates import LIST
from tools.templates.__main__ import PEOPLE

PHOTO = PEOPLE / "feedface_person1_4.png"


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    if find_chromium() is None:
        message = "no Chromium: install it (apt-get install chromium) or set FEEDFACE_CHROMIUM"
        (pytest.fail if os.environ.get("FEEDFACE_REQUIRE_BROWSER") == "1" else pytest.skip)(message)
    pytest.importorskip("playwright")
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module", params=["canvas", "nodes 2.0"])
def frontend(request: pytest.FixtureRequest, browser, server: ComfyServer) -> Iterator[Frontend]:
    """One tab for all tests of a module, one for each way of drawing. The user's own photos are there."""
    for template in LIST:
        for node in json.loads(template.api.read_text("utf-8")).values():
            if node["class_type"] == "LoadImage" and not node["inputs"]["image"].startswith("feedface_"):
                server.upload(PHOTO, node["inputs"]["image"])
    opened = Frontend(browser, server, vue=request.param != "canvas")
    yield opened
    opened.page.close()


@pytest.fixture(autouse=True)
def no_console_error(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of the browser ends without an error in its console."""
    opened = request.getfixturevalue("frontend") if "frontend" in request.fixturenames else None
    if opened:
        opened.errors.clear()
    yield
    if opened:
        assert opened.errors == []
