"""The inputs of a workflow in API format that a task fills: named by the title of their node, or found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from feedface_core.errors import FeedFaceError, listing, shorten
from feedface_core.files.tables import Where, parse_json, read_text
from tools.workflow_format import Prompt, inputs_of, value_problem

LONGEST_PROBLEM = 300  # characters: a list of choices may be a thousand files
PHOTO_LOADERS = ("LoadImage", "LoadImageMask")


class Target(NamedTuple):
    """An input of a node."""

    node: str
    input: str


@dataclass(frozen=True)
class Targets:
    """Where the prompt, the photos in their order and the seed go."""

    prompt: tuple[Target, ...] = ()
    photos: tuple[Target, ...] = ()
    seed: tuple[Target, ...] = ()


def read_workflow(path: Path) -> Prompt:
    """A workflow in API format.

    Raises:
        FeedFaceError: it cannot be read, or is in the format of the editor.
    """
    value = parse_json(read_text(path), Where(path))
    if isinstance(value, dict) and "nodes" in value and "links" in value:
        raise FeedFaceError(
            f"{path} is a workflow as the editor saves it: export it with File, Export (API), and give that file"
        )
    if not isinstance(value, dict) or not value:
        raise FeedFaceError(f"{path} is no workflow in API format: expected nodes with class_type and inputs")
    for key, node in value.items():
        if problem := node_problem(node, value):
            raise FeedFaceError(f"{path} is no workflow in API format: node {shorten(key)}: {problem}")
    return value


def node_problem(node: Any, prompt: dict[str, Any]) -> str | None:
    """What is wrong with the form of a node of a workflow."""
    if not isinstance(node, dict):
        return f"expected class_type and inputs, found {shorten(node)}"
    told = node.get("_meta") or {}
    title = told.get("title") if isinstance(told, dict) else None
    for name, found, kind, expected in (
        ("_meta", told, dict, "a title by name"),
        ("class_type", node.get("class_type"), str, "the name of a kind of node"),
        ("inputs", node.get("inputs"), dict, "values by name"),
        ("_meta.title", "" if title is None else title, str, "a text"),
    ):
        if not isinstance(found, kind):
            return f"{name} is {shorten(found)}, expected {expected}"
    for name, link in node["inputs"].items():
        if is_link(link) and str(link[0]) not in prompt:
            return f"{shorten(name)} is linked to node {shorten(link[0])}, which is not there"
    return None


def title_of(prompt: Prompt, node: str) -> str:
    return (prompt[node].get("_meta") or {}).get("title") or prompt[node]["class_type"]


def is_link(value: Any) -> bool:
    """Whether an input comes from another node, as ComfyUI tells it: the node's id and the number of its output."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)) and type(value[1]) is int


def find_target(prompt: Prompt, name: str, usual: Sequence[str] = ()) -> Target:
    """The input that a name means: ``"Title.input"``, or the title alone where a usual input is there.

    A node is named by its title, or by ``#`` and its id.

    Raises:
        FeedFaceError: no such node, several, no such input, or one that another node feeds.
    """
    title, dot, wanted = name.rpartition(".")
    nodes = nodes_called(prompt, title) if dot else []
    if not nodes and usual:
        nodes, wanted, title = nodes_called(prompt, name), "", name
    if not nodes:
        titles = sorted({title_of(prompt, node) for node in prompt})
        near = get_close_matches(title[:200], titles, 1)
        meant = f"Is {near[0]!r} meant? " if near else ""
        raise FeedFaceError(
            f"{shorten(name)}: no node is titled {shorten(title)}. {meant}The titles: {listing(titles, 30)}"
        )
    if len(nodes) > 1:
        ids = ", ".join(f"#{node}" for node in nodes)
        raise FeedFaceError(
            f"{name!r}: {len(nodes)} nodes are titled {title!r}: rename one, or write the id for it: {ids}"
        )
    inputs = prompt[nodes[0]]["inputs"]
    wanted = wanted or next((one for one in usual if one in inputs), usual[0] if usual else "")
    values = [one for one, value in inputs.items() if not is_link(value)]
    if wanted not in inputs:
        raise FeedFaceError(
            f"{name!r}: the node {title!r} has no input {shorten(wanted)}; it has {', '.join(values) or 'none'}"
        )
    if is_link(inputs[wanted]):
        source = title_of(prompt, str(inputs[wanted][0])) if str(inputs[wanted][0]) in prompt else "another node"
        raise FeedFaceError(f"{name!r}: this input comes from the node {source!r}: set it there")
    return Target(nodes[0], wanted)


def nodes_called(prompt: Prompt, title: str) -> list[str]:
    if title.startswith("#") and title[1:] in prompt:
        return [title[1:]]
    return [node for node in prompt if title_of(prompt, node) == title]


def find_targets(
    prompt: Prompt, text: str | None = None, photos: Sequence[str] = (), seed: Sequence[str] = ()
) -> Targets:
    """Where prompt, photos and seed go: as named, else as the graph shows; empty where it does not show.

    The prompt goes to the one text that reaches an input ``positive``, photos to the loaders that feed a FeedFace node
    (or to the only one) in the order of their titles, the seed to every sampler and noise.

    Raises:
        FeedFaceError: a name that leads nowhere.
    """
    return Targets(
        (find_target(prompt, text, ("text", "prompt")),) if text else tuple(positive_texts(prompt)),
        tuple(find_target(prompt, name, ("image",)) for name in photos) or tuple(face_photos(prompt)),
        tuple(find_target(prompt, name, ("seed", "noise_seed")) for name in seed) or tuple(seeds(prompt)),
    )


def positive_texts(prompt: Prompt) -> list[Target]:
    """The text that reaches the input ``positive`` of some node; none where several do."""
    found: list[Target] = []
    seen: set[str] = set()
    starts = (node["inputs"].get("positive") for node in prompt.values())
    waiting = [str(link[0]) for link in starts if is_link(link)]
    while waiting:
        node = waiting.pop()
        if node in seen or node not in prompt:
            continue
        seen.add(node)
        inputs = prompt[node]["inputs"]
        if isinstance(inputs.get("text"), str):
            found.append(Target(node, "text"))
            continue
        onward = ["positive"] if "positive" in inputs else [name for name in inputs if name.startswith("conditioning")]
        waiting += [str(inputs[name][0]) for name in onward if is_link(inputs[name])]
    return found if len(found) == 1 else []


def face_photos(prompt: Prompt) -> list[Target]:
    """The photo loaders that feed a node of this pack, or the only loader, in the order of their titles and ids."""
    loaders = [node for node, one in prompt.items() if one["class_type"] in PHOTO_LOADERS and "image" in one["inputs"]]
    feeding = {
        str(value[0])
        for node in prompt.values()
        if node["class_type"].startswith("FeedFace")
        for value in node["inputs"].values()
        if is_link(value)
    }
    faces = [node for node in loaders if node in feeding] or (loaders if len(loaders) == 1 else [])
    return [
        Target(node, "image") for node in sorted(faces, key=lambda node: numbered(f"{title_of(prompt, node)} {node}"))
    ]


def numbered(text: str) -> list[Any]:
    """A key that puts Photo 2 before Photo 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def seeds(prompt: Prompt) -> Iterator[Target]:
    for node, one in prompt.items():
        inputs = one["inputs"]
        if isinstance(inputs.get("noise_seed"), int):
            yield Target(node, "noise_seed")
        elif isinstance(inputs.get("seed"), int) and "steps" in inputs:
            yield Target(node, "seed")


def declared(object_info: dict[str, Any], kind: str, name: str) -> tuple[Any, dict[str, Any]] | None:
    """Type and options of a node's input; None if the server does not know it."""
    known = (entry for entry in inputs_of(object_info[kind]) if entry[0] == name)
    return next(((entry[1], entry[2]) for entry in known), None)


def takes_picture(declaration: tuple[Any, dict[str, Any]] | None) -> bool:
    return bool(declaration and declaration[1].get("image_upload"))


def typed(value: Any, declaration: tuple[Any, dict[str, Any]] | None) -> Any:
    """A value as the input takes it: the cell of a table is text.

    Raises:
        ValueError: it is none of the input's kind, or outside its bounds; the message says what is expected.
    """
    if declaration is None:
        return value
    kind, options = declaration
    if kind in ("INT", "FLOAT", "BOOLEAN") and isinstance(value, str):
        value = parsed(value.strip(), kind)
    if kind == "FLOAT" and isinstance(value, float) and not abs(value) < float("inf"):
        raise ValueError(f"{value} is not a finite number")
    if kind == "STRING" and not isinstance(value, str):
        value = str(value)
    if kind == "INT" and isinstance(value, float) and value.is_integer():
        value = int(value)
    problem = value_problem(kind, options, value)
    if problem:
        raise ValueError(problem if len(problem) <= LONGEST_PROBLEM else f"{problem[:LONGEST_PROBLEM]}…")
    return value


def parsed(text: str, kind: str) -> Any:
    try:
        if kind == "BOOLEAN":
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if "_" in text or not text.isascii():  # 1_0 and digits of other scripts, which Python reads
            raise ValueError
        return int(text) if kind == "INT" else float(text)
    except (ValueError, KeyError):
        wanted = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false"}[kind]
        raise ValueError(f"{shorten(text)} is not {wanted}") from None


def missing_nodes(prompt: Prompt, object_info: dict[str, Any]) -> list[str]:
    """The kinds of nodes that a server does not have."""
    return sorted({node["class_type"] for node in prompt.values()} - object_info.keys())


def saves(prompt: Prompt, object_info: dict[str, Any]) -> bool:
    return any(object_info[node["class_type"]].get("output_node") for node in prompt.values())
