"""Every node explains itself: tooltips on the node, and a help page that the server hands out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools.screenshots import names_of, stamped
from tools.server import PACK_FOLDER, ComfyServer
from tools.workflow_format import NOTES, inputs_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "web/docs"
SCRIPTS = sorted((ROOT / "web").glob("*.js"))


@pytest.fixture(scope="session")
def nodes(server: ComfyServer) -> dict[str, dict[str, Any]]:
    return {key: node for key, node in server.object_info().items() if key.startswith("FeedFace")}


def test_every_node_has_a_page_that_names_its_inputs_and_outputs(nodes: dict[str, dict[str, Any]]) -> None:
    assert {"FeedFaceLoadAdapter", "FeedFaceDetectFaces", "FeedFaceEncodeFaces", "FeedFaceApply"} <= set(nodes)
    for key, node in nodes.items():
        page = (DOCS / key / "en.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {node['display_name']}\n"), key
        assert "## Example" in page and page.count("\n## Common mistakes\n\n- ") == 1, key
        (picture,) = re.findall(r"!\[(.+?)\]\((.+?)\)", page)
        assert picture[0] == node["display_name"]
        with Image.open(DOCS / key / picture[1]) as image:
            assert min(image.size) >= 100 and len(image.convert("RGB").getcolors(10**6)) > 50
        named = [entry[0] for entry in inputs_of(node) if not entry[0].startswith("crops_")] + node["output_name"]
        missing = [name for name in named if f"| `{name}` |" not in page and f"| `{name}` … " not in page]
        assert missing == [], f"the page of {key} does not explain {missing}"


@pytest.mark.parametrize("any_comfyui", ["newest"], indirect=True)
def test_pictures_show_the_nodes_as_they_are(nodes: dict[str, dict[str, Any]]) -> None:
    for key, node in nodes.items():
        now = json.loads(json.dumps(names_of(node)))
        assert stamped(DOCS / key / "node.png") == now, f"run python -m tools.screenshots {key}, and look at it"


def texts(nodes: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Everything a user reads about the nodes, with the place where it stands."""
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *DOCS.glob("*/en.md")]:
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for path in (ROOT / "example_workflows").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] in NOTES:
                yield f"a note in {path.name}", node["widgets_values"][0]
    for key, node in nodes.items():
        tips = [options.get("tooltip", "") for _, _, options, _ in inputs_of(node)]
        yield f"the texts on {key}", " ".join([node["description"], *tips, *node["output_tooltips"]])


def test_a_node_has_one_name_everywhere(nodes: dict[str, dict[str, Any]]) -> None:
    names = [node["display_name"] for node in nodes.values()]
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## The nodes")[1].split("###")[0]
    assert sorted(re.findall(r"\*\*(FeedFace .+?)\*\*", table)) == sorted(names)
    assert len(set(names)) == len(names) and all(name.startswith("FeedFace ") for name in names)
    cut = {name: name.removeprefix("FeedFace ") for name in names}
    for place, text in texts(nodes):
        found = [name for name, rest in cut.items() if re.search(rf"(?<!FeedFace )\b{rest}\b", text)]
        assert found == [], f"{place} leaves out the first word of {found}"
        unknown = re.findall(rf"\*(FeedFace (?!{'|'.join(cut.values())})[A-Z].*?)\*", text)
        assert unknown == [], f"{place} names nodes that do not exist: {unknown}"


def test_an_input_has_one_name_everywhere(nodes: dict[str, dict[str, Any]]) -> None:
    """A label of its own would show on some frontends only, and nowhere in a message or in the API."""
    for key, node in nodes.items():
        for name, _, options, _ in inputs_of(node):
            assert options.get("display_name") in (None, name), f"{key}.{name}"


def test_every_page_belongs_to_a_node_of_the_source() -> None:
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "nodes").rglob("*.py"))
    for page in DOCS.glob("*/en.md"):
        assert f'make_schema(\n            "{page.parent.name}"' in source, page.parent.name


def test_every_input_and_output_has_a_tooltip(nodes: dict[str, dict[str, Any]]) -> None:
    for key, node in nodes.items():
        assert node["description"], key
        for name, _, options, _ in inputs_of(node):
            assert options.get("tooltip"), f"{key}.{name}"
        assert all(node["output_tooltips"]), f"{key}: an output has no tooltip"


def test_server_hands_out_pages_and_script(server: ComfyServer, nodes: dict[str, dict[str, Any]]) -> None:
    for key in nodes:
        page = server.request("GET", f"/extensions/{PACK_FOLDER}/docs/{key}/en.md")
        assert page.content == (DOCS / key / "en.md").read_bytes()
        picture = server.request("GET", f"/extensions/{PACK_FOLDER}/docs/{key}/node.png")
        assert picture.content.startswith(b"\x89PNG")
    extensions = server.get("/extensions")
    assert all(f"/extensions/{PACK_FOLDER}/{path.name}" in extensions for path in SCRIPTS)


def test_scripts_use_the_public_part_of_the_frontend() -> None:
    """Of the frontend's own modules only app.js is for extensions; it warns when another is imported."""
    for path in SCRIPTS:
        script = path.read_text(encoding="utf-8")
        assert re.findall(r'(?:from|import) *\(?"(.+?)"', script) == ["../../scripts/app.js"]
        assert "inputEl" not in script
