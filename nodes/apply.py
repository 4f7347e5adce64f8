"""Nodes that put a face into a model, or onto one prompt."""

from __future__ import annotations

import logging

import node_helpers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..feedface_core.conditioning import Face, FaceControl
from ..feedface_core.errors import FeedFaceError
from .adapter import LoadedAdapter
from .checks import check_mask, check_number
from .model_patch import CONTROLS, FacePatch
from .types import Adapter, FaceSocket, make_schema

STRENGTH = {"default": 1.0, "min": 0.0, "max": 3.0, "step": 0.05}


class ApplyFeedFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceApply",
            inputs=[
                io.Model.Input("model"),
                Adapter.Input("adapter"),
                FaceSocket.Input("face", optional=True),
                io.Float.Input("strength", **STRENGTH),
                io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01),
                io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.01),
                io.Mask.Input("mask", optional=True),
            ],
            outputs=[io.Model.Output()],
            search_aliases=["feedface", "apply face", "face adapter", "ipadapter", "instantid", "pulid", "identity"],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        adapter: LoadedAdapter,
        strength: float,
        start: float,
        end: float,
        face: Face | None = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        node = "FeedFace Apply Adapter"
        for name, value, most in (("strength", strength, 3.0), ("start", start, 1.0), ("end", end, 1.0)):
            check_number(node, name, value, 0.0, most)
        if start > end:
            raise FeedFaceError(f"{node}: start {start} lies after end {end}; the face would never act")
        if face is None:
            logging.warning("[FeedFace] %s: no face is connected, only prompts with FeedFace Set Face get one.", node)
        else:
            adapter.check_face(face)
        control = FaceControl(face, strength, check_mask(node, mask), start, end)
        return io.NodeOutput(FacePatch.apply(adapter, control, model))


class SetFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceSetFace",
            inputs=[
                io.Conditioning.Input("conditioning"),
                FaceSocket.Input("face", optional=True),
                io.Float.Input("strength", **STRENGTH),
                io.Mask.Input("mask", optional=True),
                Adapter.Input("adapter", optional=True),
            ],
            outputs=[io.Conditioning.Output()],
            search_aliases=["regional face", "two people", "several faces", "face region", "face per prompt"],
        )

    @classmethod
    def execute(
        cls,
        conditioning,
        strength: float,
        face: Face | None = None,
        mask: Tensor | None = None,
        adapter: LoadedAdapter | None = None,
    ) -> io.NodeOutput:
        node = "FeedFace Set Face"
        if adapter is not None and face is not None:
            adapter.check_face(face)
        control = FaceControl(face, check_number(node, "strength", strength, 0.0, 3.0), check_mask(node, mask))
        key = None if adapter is None else adapter.key
        # A new dict for each: prompts share what they were made from.
        own = [{**entry[1].get(CONTROLS, {}), key: control} for entry in conditioning]
        return io.NodeOutput(
            [
                node_helpers.conditioning_set_values([entry], {CONTROLS: controls})[0]
                for entry, controls in zip(conditioning, own, strict=True)
            ]
        )


NODES = [ApplyFeedFace, SetFace]
