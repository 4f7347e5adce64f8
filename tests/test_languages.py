"""Names and tooltips in every language: complete, translated, and handed out by the server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.server import ComfyServer
from tools.workflow_format import inputs_of

LOCALES = Path(__file__).resolve().parents[1] / "locales"
LANGUAGES = ("zh", "ja", "ko", "de", "fr")
#: Words of files, folders, options and other nodes, which a translation leaves as they are.
FIXED = r"models/[A-Za-z_/]+|[A-Za-z0-9_-]+\.(?:pth|pt|safetensors)|SamplerCustomAdvanced|Face0|weighted_average|concat"
#: Words that people search for.
WANTED = ("portrait", "person", "likeness", "consistent character", "face swap")


def read(language: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, node


def test_every_input_and_output_has_a_key(server: ComfyServer) -> None:
    nodes = {key: node for key, node in server.object_info().items() if key.startswith("FeedFace")}
    english = read("en")
    assert set(english) == set(nodes)
    for key, node in nodes.items():
        assert set(english[key]["inputs"]) == {name for name, *_ in inputs_of(node)}, key
        assert len(english[key]["outputs"]) == len(node["output"]), key
    assert {path.name for path in LOCALES.iterdir()} == {"en", *LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_language_is_complete(language: str) -> None:
    english, other = dict(leaves(read("en"))), dict(leaves(read(language)))
    assert list(other) == list(english)
    for path, text in other.items():
        assert text.strip() == text != "", path
        assert set(re.findall(FIXED, english[path])) <= set(re.findall(FIXED, text)), path
        assert len(text) > 20 or len(english[path]) < 120, f"{path}: {text} is not all of {english[path]}"
    sentences = [path for path in english if path[-1] in ("tooltip", "description")]
    assert [path for path in sentences if other[path] == english[path]] == []
    names = [other[key, "display_name"] for key in read("en")]
    assert len(set(names)) == len(names) and all(name.startswith("FeedFace ") for name in names)


@pytest.mark.parametrize("language", LANGUAGES)
def test_tooltips_name_nodes_as_the_language_does(language: str) -> None:
    """Who reads a tooltip looks for that title on the canvas."""
    english, other = read("en"), read(language)
    texts = dict(leaves(other))
    for path, text in leaves(english):
        for key, node in english.items():
            if path[-1] != "display_name" and re.search(rf"\b{node['display_name']}\b", text):
                assert other[key]["display_name"] in texts[path], path


def test_server_hands_out_the_languages(server: ComfyServer) -> None:
    translations = server.get("/i18n")
    for language in ("en", *LANGUAGES):
        assert translations[language]["nodeDefs"].items() >= read(language).items()


def test_people_find_the_nodes_by_their_own_words(server: ComfyServer) -> None:
    nodes = [node for key, node in server.object_info().items() if key.startswith("FeedFace")]
    if not any("search_aliases" in node for node in nodes):
        assert server.get("/system_stats")["system"]["comfyui_version"] == "0.3.75"  # which has no such words
        return
    words = {word for node in nodes for word in node["search_aliases"]}
    assert set(WANTED) <= words


def test_seldom_needed_inputs_are_marked(server: ComfyServer) -> None:
    nodes = server.object_info()
    marked = {(key, name) for key in nodes for name, _, options, _ in inputs_of(nodes[key]) if options.get("advanced")}
    ours = {entry for entry in marked if entry[0].startswith("FeedFace")}
    assert {("FeedFaceDetectFaces", "crop_size"), ("FeedFaceLoadAdapter", "face_encoder")} <= ours
    assert ("FeedFaceApply", "strength") not in ours
