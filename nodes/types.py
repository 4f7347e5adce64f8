"""The sockets of this pack, and how a node's schema gets its texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from comfy_api.latest import io

Adapter = io.Custom("FEEDFACE_ADAPTER")
FaceSocket = io.Custom("FEEDFACE_FACE")
ScheduleSocket = io.Custom("FEEDFACE_SCHEDULE")

#: Names and tooltips, in the form in which ComfyUI's frontend takes translations: the other languages lie beside it.
TEXTS = json.loads((Path(__file__).parents[1] / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
_NEWER_FIELDS = frozenset({"search_aliases"})  # ComfyUI 0.3.75 does not know them; any other unknown field is an error


def make_schema(node_id: str, inputs: list, outputs: list, advanced: Collection[str] = (), **fields: Any) -> io.Schema:
    """The schema of a node, with its name, description and tooltips from ``locales/en/nodeDefs.json``.

    Args:
        advanced: inputs that are seldom needed, which newer frontends fold away.
    """
    texts = TEXTS[node_id]
    for one in inputs:
        one.tooltip = texts["inputs"][one.id]["tooltip"]
        if one.id in advanced:  # in the dict, since ComfyUI 0.3.75 has no argument for it
            one.extra_dict = {**(one.extra_dict or {}), "advanced": True}
    for index, one in enumerate(outputs):
        one.display_name, one.tooltip = (texts["outputs"][str(index)][key] for key in ("name", "tooltip"))
    unknown = _NEWER_FIELDS - {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(
        node_id=node_id,
        display_name=texts["display_name"],
        description=texts["description"],
        category="FeedFace",
        inputs=inputs,
        outputs=outputs,
        **{name: value for name, value in fields.items() if name not in unknown},
    )
