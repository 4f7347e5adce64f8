"""Blueprints: listed where the version knows them, and in a graph in the place of the nodes inside."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tools.browser import Frontend
from tools.templates import LIST
from tools.templates.blueprints import FOLDER

pytestmark = pytest.mark.browser
#: For each blueprint: the template that it is put into, titles or kinds of the nodes that it stands for, and its ends:
#: what goes into its inputs and what takes its outputs, as (title or kind, slot).
PLACES = {
    "Photo to face": (
        "portrait",
        ["FeedFaceDetectFaces", "FeedFaceEncodeFaces"],
        [("LoadImage", 0), ("FeedFaceLoadAdapter", 0)],
        {0: ("FeedFaceApply", "face")},
    ),
    "Two people": (
        "two_people",
        ["FeedFaceApply", "ConditioningSetAreaPercentage", "FeedFaceSetFace", "ConditioningCombine"],
        [
            ("FeedFaceSmallModel", 0),
            ("FeedFaceLoadAdapter", 0),
            ("Left face", 0),
            ("Right face", 0),
            ("Scene", 0),
            ("Left prompt", 0),
            ("Right prompt", 0),
        ],
        {0: ("KSampler", "model"), 1: ("KSampler", "positive")},
    ),
}


def replace(graph: dict[str, Any], blueprint: dict[str, Any], name: str) -> dict[str, Any]:
    """A template's graph with a blueprint in the place of some of its nodes."""
    _, kinds, sources, targets = PLACES[name]
    (one,) = blueprint["nodes"]
    named = {key: node for node in graph["nodes"] for key in (node["type"], node.get("title"))}
    gone = {node["id"] for node in graph["nodes"] if node["type"] in kinds}
    links = [link for link in graph["links"] if not {link[1], link[3]} & gone]
    nodes = [node for node in graph["nodes"] if node["id"] not in gone]
    kept = {link[0] for link in links}
    for node in nodes:
        for socket in node["inputs"]:
            socket["link"] = socket["link"] if socket["link"] in kept else None
        for socket in node["outputs"]:
            socket["links"] = [link for link in socket["links"] or [] if link in kept]
    one["id"] = 90
    ends = [(named[key], slot, one, place) for place, (key, slot) in enumerate(sources)]
    for slot, (key, socket) in targets.items():
        ends.append((one, slot, named[key], [each["name"] for each in named[key]["inputs"]].index(socket)))
    for number, (source, slot, target, place) in enumerate(ends, 900):
        links.append([number, source["id"], slot, target["id"], place, source["outputs"][slot]["type"]])
        source["outputs"][slot]["links"].append(number)
        target["inputs"][place]["link"] = number
    graph |= {"nodes": [*nodes, one], "links": links, "definitions": blueprint["definitions"]}
    return graph | {"last_node_id": 90, "last_link_id": 999}


def set_up(graph: dict[str, Any], blueprint: dict[str, Any]) -> None:
    """Give the nodes inside what the template gives its own: what the small model's faces need."""
    own = {node["type"]: node["widgets_values"] for node in graph["nodes"]}
    for node in blueprint["definitions"]["subgraphs"][0]["nodes"]:
        if node["type"].startswith("FeedFace"):
            node["widgets_values"] = own[node["type"]]


@pytest.mark.parametrize("name", PLACES)
def test_blueprint_works_as_a_node(frontend: Frontend, name: str) -> None:
    listed = frontend.server.get("/global_subgraphs")
    assert {one["name"] for one in listed.values()} >= {path.stem for path in FOLDER.glob("*.json")}
    template = next(one for one in LIST if (one.feature.key, one.base.name) == (PLACES[name][0], "small"))
    graph = template.build(frontend.server.object_info())
    blueprint = json.loads((FOLDER / f"FeedFace {name}.json").read_text("utf-8"))
    set_up(graph, blueprint)
    frontend.open_graph(replace(graph, blueprint, name))
    outputs = frontend.run()
    (made,) = (one for output in outputs.values() for one in output.get("images", []) if one["type"] == "output")
    assert frontend.server.view(made).std() > 20
