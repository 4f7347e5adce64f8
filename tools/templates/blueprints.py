"""Subgraph blueprints: a few nodes as one, in the list of nodes of every graph.

ComfyUI lists the files of a pack's ``subgraphs`` folder. Versions that do not know blueprints take no notice of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.find_comfyui import ROOT
from tools.templates.graph import COLUMN, GAP, TITLE, Graph, Node, Output
from tools.workflow_format import ObjectInfo, Workflow

FOLDER = ROOT / "subgraphs"
NAMES = uuid.UUID("5f6a2c1e-7d0b-4f3e-9c55-feedfacefeed")  # ids are derived from it, so that a file stays the same
INSIDE, OUTSIDE = -10, -20  # numbers of the nodes that stand for inputs and outputs


@dataclass(frozen=True)
class Socket:
    """An input or output of a blueprint: its name and type, and for an output what it is."""

    name: str
    kind: str
    source: Output | None = None


class Blueprint(Graph):
    """A graph that becomes one node.

    Args:
        name: of the node and the file.
        description: its tooltip.
        inputs: sockets by name and type.
    """

    def __init__(self, object_info: ObjectInfo, name: str, description: str, inputs: Sequence[tuple[str, str]]) -> None:
        super().__init__(object_info)
        self.name, self.description = name, description
        self.inputs = [Socket(*one) for one in inputs]
        self.outputs: list[Socket] = []
        self.shown: list[tuple[Node, str]] = []
        self.boundary = Node("", INSIDE, -1, {})

    def input(self, name: str) -> Output:
        return self.boundary[[one.name for one in self.inputs].index(name)]

    def finish(self, outputs: Sequence[tuple[str, Output]], shown: Sequence[tuple[Node, str]]) -> None:
        """Name the outputs, and the widgets that are shown on the node itself."""
        for name, source in outputs:
            self.outputs.append(Socket(name, self.object_info[source.node.kind]["output"][source.slot], source))
        self.shown = list(shown)

    def kind_of(self, source: Output) -> str:
        return self.inputs[source.slot].kind if source.node is self.boundary else super().kind_of(source)

    def id_of(self, *parts: str) -> str:
        return str(uuid.uuid5(NAMES, "/".join((self.name, *parts))))

    def to_file(self) -> Workflow:
        """A workflow of one node, with the subgraph as its definition."""
        nodes, bare = self.file_nodes(0)
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        links = [dict(zip(keys, link, strict=True)) for link in bare]
        for slot, one in enumerate(self.outputs):
            number = len(links) + 1
            links.append(
                dict(zip(keys, (number, one.source.node.number, one.source.slot, OUTSIDE, slot, one.kind), strict=True))
            )
            (node,) = (node for node in nodes if node["id"] == one.source.node.number)
            output = node["outputs"][one.source.slot]
            output["links"] = [*(output["links"] or []), number]
        right = max(node["pos"][0] for node in nodes) + COLUMN + GAP
        number = max(node.number for node in self.nodes) + 1
        one_node = {"id": number, "type": self.id_of(), "pos": [0, TITLE], "size": [COLUMN, 200], "flags": {}}
        one_node |= {"order": 0, "mode": 0, "title": self.name}
        one_node["inputs"] = [{"name": one.name, "type": one.kind, "link": None} for one in self.inputs]
        one_node["outputs"] = [{"name": one.name, "type": one.kind, "links": []} for one in self.outputs]
        one_node["properties"] = {"proxyWidgets": [[str(node.number), name] for node, name in self.shown]}
        one_node["widgets_values"] = []
        definition = {"id": self.id_of(), "version": 1, "revision": 0, "config": {}, "name": self.name}
        definition["state"] = {"lastGroupId": 0, "lastNodeId": number, "lastLinkId": len(links), "lastRerouteId": 0}
        definition["inputNode"] = {"id": INSIDE, "bounding": [-220, TITLE, 140, 40 + 20 * len(self.inputs)]}
        definition["outputNode"] = {"id": OUTSIDE, "bounding": [right, TITLE, 140, 40 + 20 * len(self.outputs)]}
        definition["inputs"] = self.sockets_of(self.inputs, links, "origin", INSIDE)
        definition["outputs"] = self.sockets_of(self.outputs, links, "target", OUTSIDE)
        definition |= {"widgets": [], "nodes": nodes, "groups": [], "links": links, "extra": {}}
        definition |= {"category": "FeedFace", "description": self.description}
        workflow = {"revision": 0, "last_node_id": number, "last_link_id": 0, "nodes": [one_node], "links": []}
        return {**workflow, "version": 0.4, "definitions": {"subgraphs": [definition]}, "extra": {}}

    def sockets_of(self, sockets: list[Socket], links: list[dict[str, Any]], end: str, node: int) -> list[dict]:
        made = []
        for slot, one in enumerate(sockets):
            own = [link["id"] for link in links if (link[f"{end}_id"], link[f"{end}_slot"]) == (node, slot)]
            made.append({"id": self.id_of(end, one.name), "name": one.name, "type": one.kind, "linkIds": own})
        return made


def photo_to_face(object_info: ObjectInfo) -> Blueprint:
    made = Blueprint(
        object_info,
        "Photo to face",
        "Finds a face in a photo and encodes it with the adapter: FeedFace Detect Faces and FeedFace Encode Faces.",
        [("photo", "IMAGE"), ("adapter", "FEEDFACE_ADAPTER")],
    )
    adapter = made.input("adapter")
    crops = made.add("FeedFaceDetectFaces", 0, node_height=520, image=made.input("photo"), adapter=adapter)
    face = made.add("FeedFaceEncodeFaces", 1, adapter=adapter, crops=crops[0])
    made.finish(
        [("face", face[0]), ("preview", crops[2]), ("report", crops[3])], [(crops, "order"), (crops, "indexes")]
    )
    return made


def two_people(object_info: ObjectInfo) -> Blueprint:
    prompts = [(f"{name}_prompt", "CONDITIONING") for name in ("scene", "left", "right")]
    faces = [("left_face", "FEEDFACE_FACE"), ("right_face", "FEEDFACE_FACE")]
    made = Blueprint(
        object_info,
        "Two people",
        "A prompt for the scene and one for each half, with a face of its own: model and positive for a sampler.",
        [("model", "MODEL"), ("adapter", "FEEDFACE_ADAPTER"), *faces, *prompts],
    )
    model = made.add("FeedFaceApply", 0, model=made.input("model"), adapter=made.input("adapter"))
    together, shown = made.input("scene_prompt"), []
    for column, (side, x) in enumerate((("left", 0.0), ("right", 0.5)), 1):
        area = made.add(
            "ConditioningSetAreaPercentage",
            column,
            conditioning=made.input(f"{side}_prompt"),
            width=0.5,
            height=1.0,
            x=x,
            y=0.0,
            strength=1.0,
        )
        given = made.add(
            "FeedFaceSetFace", column, title=f"{side} face", conditioning=area[0], face=made.input(f"{side}_face")
        )
        together = made.add("ConditioningCombine", column, conditioning_1=together, conditioning_2=given[0])[0]
        shown.append((given, "strength"))
    made.finish([("model", model[0]), ("positive", together)], shown)
    return made


def blueprints(object_info: ObjectInfo) -> dict[Path, Workflow]:
    """Every blueprint by its file."""
    made = [build(object_info) for build in (photo_to_face, two_people)]
    return {FOLDER / f"FeedFace {one.name}.json": one.to_file() for one in made}
