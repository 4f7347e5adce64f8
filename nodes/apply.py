"""Nodes that put a face into a model, or onto one prompt."""

from __future__ import annotations

import logging

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..feedface_core.conditioning import Face, FaceControl
from ..feedface_core.errors import FeedFaceError
from ..feedface_core.schedule import Schedule
from .adapter import LoadedAdapter
from .checks import checked
from .model_patch import CONTROLS, FacePatch
from .types import Adapter, FaceSocket, ScheduleSocket, make_schema

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
                FaceSocket.Input("background", optional=True),
                io.Float.Input("background_strength", optional=True, **STRENGTH),
                ScheduleSocket.Input("schedule", optional=True),
            ],
            outputs=[io.Model.Output()],
            search_aliases=[
                *("feedface", "apply face", "face adapter", "ipadapter", "instantid", "pulid", "identity"),
                *("portrait", "person", "likeness", "consistent character", "face swap", "faceid"),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: ModelPatcher,
        adapter: LoadedAdapter,
        strength: float,
        start: float,
        end: float,
        face: Face | None = None,
        mask: Tensor | None = None,
        background: Face | None = None,
        background_strength: float = 1.0,
        schedule: Schedule | None = None,
    ) -> io.NodeOutput:
        if start > end:
            raise FeedFaceError(f"start {start} lies after end {end}; the face would never act")
        if face is None:
            logging.warning(
                "[FeedFace] Apply Adapter: no face is connected, only prompts with FeedFace Set Face get one."
            )
        else:
            adapter.check_face(face)
        stream, *others = adapter.streams
        patched = FacePatch.apply(stream, FaceControl(face, strength, mask, start, end, schedule), model)
        check_background(adapter, background)
        for other in others:  # without a background prompts can still have one of their own
            control = FaceControl(background, background_strength, None, start, end)
            patched = FacePatch.apply(other, control, patched)
        return io.NodeOutput(patched)


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
                FaceSocket.Input("background", optional=True),
                io.Float.Input("background_strength", optional=True, **STRENGTH),
            ],
            outputs=[io.Conditioning.Output()],
            search_aliases=[
                *("regional face", "two people", "several faces", "face region", "face per prompt"),
                *("group portrait", "several people", "consistent character"),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        conditioning,
        strength: float,
        face: Face | None = None,
        mask: Tensor | None = None,
        adapter: LoadedAdapter | None = None,
        background: Face | None = None,
        background_strength: float = 1.0,
    ) -> io.NodeOutput:
        if adapter is not None and face is not None:
            adapter.check_face(face)
        controls = {None if adapter is None else adapter.key: FaceControl(face, strength, mask)}
        if background is not None:
            if adapter is None:
                raise FeedFaceError("a background needs the adapter as well: connect the one that Apply Adapter has")
            check_background(adapter, background)
            controls[adapter.streams[1].key] = FaceControl(background, background_strength)
        return io.NodeOutput(
            # New dicts for each: prompts share what they were made from.
            [[text, {**values, CONTROLS: {**values.get(CONTROLS, {}), **controls}}] for text, values in conditioning]
        )


def check_background(adapter: LoadedAdapter, background: Face | None) -> None:
    """Raises :class:`FeedFaceError` for a background that the adapter has no stream for, or that is none."""
    if background is None:
        return
    if len(adapter.streams) < 2:
        raise FeedFaceError(
            f"{adapter.name} has no second stream for a background; disconnect it, or load an adapter of that kind"
        )
    adapter.streams[1].check_face(background)


NODES = [ApplyFeedFace, SetFace]
