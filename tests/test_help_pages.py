"""Every node explains itself: tooltips on the node, and a help page that the server hands out."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tools.server import PACK_FOLDER, ComfyServer
from tools.workflow_format import inputs_of

DOCS = Path(__file__).resolve().parents[1] / "web/docs"


@pytest.fixture(scope="session")
def nodes(server: ComfyServer) -> dict[str, dict[str, Any]]:
    return {key: node for key, node in server.object_info().items() if key.startswith("FeedFace")}


def test_every_node_has_a_page_that_names_its_inputs_and_outputs(nodes: dict[str, dict[str, Any]]) -> None:
    assert {"FeedFaceLoadAdapter", "FeedFaceDetectFaces", "FeedFaceEncodeFaces", "FeedFaceApply"} <= set(nodes)
    for key, node in nodes.items():
        page = (DOCS / key / "en.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {node['display_name']}\n"), key
        assert "## Example" in page, key
        named = [entry[0] for entry in inputs_of(node) if not entry[0].startswith("crops_")] + node["output_name"]
        missing = [name for name in named if f"| `{name}` |" not in page and f"| `{name}` … " not in page]
        assert missing == [], f"the page of {key} does not explain {missing}"


def test_every_page_belongs_to_a_node_of_the_source() -> None:
    source = "\n".join(path.read_text("utf-8") for path in (DOCS.parents[1] / "nodes").glob("*.py"))
    for page in DOCS.glob("*/en.md"):
        assert f'node_id="{page.parent.name}"' in source, page.parent.name


def test_every_input_and_output_has_a_tooltip(nodes: dict[str, dict[str, Any]]) -> None:
    for key, node in nodes.items():
        assert node["description"], key
        for name, _, options, _ in inputs_of(node):
            assert options.get("tooltip"), f"{key}.{name}"
        assert all(node["output_tooltips"]), f"{key}: an output has no tooltip"


def test_server_hands_out_pages_and_script(server: ComfyServer, nodes: dict[str, dict[str, Any]]) -> None:
    address = f"{server.address}/extensions/{PACK_FOLDER}"
    for key in nodes:
        with urllib.request.urlopen(f"{address}/docs/{key}/en.md", timeout=60) as answer:
            assert answer.read() == (DOCS / key / "en.md").read_bytes()
    assert f"/extensions/{PACK_FOLDER}/feedface.js" in server.get("/extensions")
