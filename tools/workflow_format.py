"""Workflows as files: from the frontend's format to the API's, and what a server would object to in them.

    python -m tools.workflow_format http://127.0.0.1:8188 workflows/graphs/*.json

writes ``workflows/api/<name>.json`` for each of them, as "Export (API)" in the frontend does, and says what a
server would refuse. The server says which inputs a node has (``/object_info``); nothing is queued.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.comfy_client import ComfyClient

Workflow = dict[str, Any]
Prompt = dict[str, Any]
ObjectInfo = dict[str, Any]

NOTES = frozenset({"Note", "MarkdownNote"})
WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": object}
#: Inputs whose choices are files of the machine at hand, not part of the node.
FILES = frozenset(
    {
        ("CheckpointLoaderSimple", "ckpt_name"),
        ("LoadImage", "image"),
        ("LoadImageMask", "image"),
        ("LoraLoader", "lora_name"),
        ("ControlNetLoader", "control_net_name"),
        ("FeedFaceLoadAdapter", "adapter_name"),
        ("FeedFaceLoadFace", "face_name"),
        ("FeedFaceLoadUniDiffuser", "uvit"),
        ("FeedFaceLoadUniDiffuser", "caption_decoder"),
    }
)


class WorkflowError(ValueError):
    """A workflow that cannot be converted; the message names the node."""


def inputs_of(node_info: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """Name, type (a list for choices), options and whether it is required, in the order of the node's widgets."""
    for group in ("required", "optional"):
        for name, declared in (node_info["input"].get(group) or {}).items():
            # Packs declare as they like: what is no list of type and options has a type that nobody here knows.
            kind, *more = declared if isinstance(declared, (list, tuple)) and declared else [str(declared)]
            options = more[0] if more and isinstance(more[0], dict) else {}
            yield name, kind if isinstance(kind, (str, list)) else str(kind), options, group == "required"


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def widget_values(node: dict[str, Any], node_info: dict[str, Any]) -> dict[str, Any]:
    """Values of a node's widgets by name.

    The frontend's format keeps them as a bare list, in which a seed is followed by what becomes of it after a run, and
    a picture by the kind of upload.

    Raises:
        WorkflowError: another number of values than widgets, optional ones at the end aside.
    """
    left = list(node.get("widgets_values") or [])
    values = {}
    for name, kind, options, required in inputs_of(node_info):
        if not is_widget(kind, options):
            continue
        if not left and not required:  # a widget that is younger than the file: the frontend gives it its default
            continue
        if not left:
            if not required:  # it came with a later version of the node, which has a default for it
                continue
            raise WorkflowError(f"node {node['id']} ({node['type']}): no value for the widget {name}")
        values[name] = left.pop(0)
        if options.get("control_after_generate") or options.get("image_upload"):
            left = left[1:]
    if left:
        raise WorkflowError(f"node {node['id']} ({node['type']}): values without a widget: {left}")
    return values


def to_api(workflow: Workflow, object_info: ObjectInfo) -> Prompt:
    """What the frontend would queue for a workflow: node ids, their kinds, titles, values and links.

    Raises:
        WorkflowError: an unknown node, wrong widget values, a muted or bypassed node, or a subgraph.
    """
    if workflow.get("definitions", {}).get("subgraphs"):
        raise WorkflowError("subgraphs are not supported")
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in sorted(workflow["nodes"], key=lambda node: node["order"]):
        kind = node["type"]
        if kind in NOTES:
            continue
        if kind not in object_info:
            raise WorkflowError(f"node {node['id']}: no node of the kind {kind} is installed")
        if node.get("mode"):
            raise WorkflowError(f"node {node['id']} ({kind}) is muted or bypassed")
        inputs = widget_values(node, object_info[kind])
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = list(links[socket["link"]])
        title = node.get("title") or object_info[kind].get("display_name") or kind
        prompt[str(node["id"])] = {"inputs": inputs, "class_type": kind, "_meta": {"title": title}}
    return prompt


def problems(prompt: Prompt, object_info: ObjectInfo) -> list[str]:
    """What is wrong with a workflow in API format, a line each; names of files are not looked at."""
    found = []
    for key, node in prompt.items():
        kind = node["class_type"]
        name = f"node {key} ({kind})"
        if kind not in object_info:
            found.append(f"{name}: no such node")
            continue
        declared = {entry[0]: entry for entry in inputs_of(object_info[kind])}
        found += [f"{name}: no input {extra!r}" for extra in node["inputs"] if extra not in declared]
        for entry in declared.values():
            problem = input_problem(entry, node, prompt, object_info)
            if problem:
                found.append(f"{name}: {entry[0]}: {problem}")
    return found


def input_problem(
    entry: tuple[str, Any, dict[str, Any], bool], node: dict[str, Any], prompt: Prompt, object_info: ObjectInfo
) -> str | None:
    name, kind, options, required = entry
    if name not in node["inputs"]:
        return "missing" if required else None
    value = node["inputs"][name]
    if isinstance(value, list):
        return link_problem(kind, value, prompt, object_info)
    if not is_widget(kind, options):
        return f"{value!r} is not a link"
    return None if (node["class_type"], name) in FILES else value_problem(kind, options, value)


def value_problem(kind: Any, options: dict[str, Any], value: Any) -> str | None:
    """What is wrong with the value of a widget; a value of a kind not known here passes."""
    choices = kind if isinstance(kind, list) else options.get("options")
    if isinstance(choices, (list, tuple)):
        return None if value in choices else f"{value!r} is none of {', '.join(map(str, choices))}"
    if kind not in WIDGETS:
        return None
    if not isinstance(value, WIDGETS[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        return f"{value!r} is not {kind}"
    if kind in ("INT", "FLOAT"):
        low, high = (limit if isinstance(limit, (int, float)) else value for limit in map(options.get, ("min", "max")))
        if not low <= value <= high:
            return f"{value} is outside {options.get('min')} to {options.get('max')}"
    return None


def link_problem(kind: Any, link: list[Any], prompt: Prompt, object_info: ObjectInfo) -> str | None:
    source, slot = link
    if source not in prompt:
        return f"linked to node {source}, which is not there"
    outputs = object_info.get(prompt[source]["class_type"], {}).get("output", [])
    if slot >= len(outputs):
        return f"linked to output {slot} of node {source}, which has {len(outputs)}"
    wanted = "COMBO" if isinstance(kind, list) else kind
    if wanted == "*" or outputs[slot] == "*" or set(wanted.split(",")) & set(outputs[slot].split(",")):
        return None
    return f"needs {wanted}, linked to {outputs[slot]} of node {source}"


def api_path(path: Path) -> Path:
    """The twin in API format of a graph in ``graphs``: in the folder ``api`` beside that one."""
    return path.parent.with_name("api") / path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="address of a running ComfyUI with this pack")
    parser.add_argument("workflows", type=Path, nargs="+")
    options = parser.parse_args()
    object_info = ComfyClient(options.server).object_info()
    bad = 0
    for path in options.workflows:
        prompt = to_api(json.loads(path.read_text("utf-8")), object_info)
        text = json.dumps(prompt, indent=2, ensure_ascii=False) + "\n"
        api_path(path).parent.mkdir(exist_ok=True)
        api_path(path).write_text(text, encoding="utf-8")
        wrong = problems(prompt, object_info)
        bad += len(wrong)
        print("\n".join([f"{api_path(path)}: {len(prompt)} nodes", *wrong]))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
