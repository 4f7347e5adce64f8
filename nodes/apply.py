"""Nodes that put a face into a model, or onto one prompt."""

from __future__ import annotations

import logging

import node_helpers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..feedface_core.conditioning import Face, FaceControl
from .adapter import LoadedAdapter
from .compat import make_schema
from .model_patch import CONTROLS, FacePatch
from .types import Adapter, FaceSocket

_MASK_TIP = "Where the face may act, in the shape of the picture being made: white acts, black does not."


def check_mask(mask: Tensor | None, node: str) -> Tensor | None:
    """A mask as ``(M, H, W)`` within 0…1. Raises ``ValueError`` that names the node."""
    if mask is None:
        return None
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"{node}: mask must be (masks, height, width), got {tuple(mask.shape)}")
    if not torch.isfinite(mask).all():
        raise ValueError(f"{node}: mask holds NaN or infinite values; check the node that made it")
    return mask.clamp(0.0, 1.0)


class ApplyFeedFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="FeedFaceApply",
            display_name="FeedFace Apply Adapter",
            search_aliases=["feedface", "apply face", "face adapter", "ipadapter", "instantid", "pulid", "identity"],
            description=(
                "Gives a model an adapter and a face. Every prompt but the negative one gets the face; FeedFace Set "
                "Face changes that for one prompt. The model that comes in stays as it is."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model the adapter was trained for."),
                Adapter.Input("adapter", tooltip="From FeedFace Load Adapter."),
                FaceSocket.Input(
                    "face",
                    optional=True,
                    tooltip="From FeedFace Encode Faces or FeedFace Load Face. Without one, only prompts "
                    "with FeedFace Set Face get a face.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Factor on what the adapter adds. 0 is the model without a face; the released "
                    "UniDiffuser adapter is meant for 0.8. FeedFace Adapter Info shows each "
                    "adapter's own.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the sampling run after which the face begins to act. A later start "
                    "leaves the composition to the prompt.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the sampling run after which the face no longer acts.",
                ),
                io.Mask.Input("mask", optional=True, tooltip=_MASK_TIP),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="For a sampler, a guider, or another FeedFace Apply Adapter."
                )
            ],
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
        if start > end:
            raise ValueError(f"FeedFace Apply Adapter: start {start} lies after end {end}; the face would never act")
        if face is None:
            logging.warning(
                "[FeedFace] FeedFace Apply Adapter: no face is connected, so only prompts with FeedFace "
                "Set Face get one."
            )
        else:
            adapter.check_face(face)
        control = FaceControl(face, strength, check_mask(mask, "FeedFace Apply Adapter"), start, end)
        return io.NodeOutput(FacePatch.apply(adapter, control, model))


class SetFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="FeedFaceSetFace",
            display_name="FeedFace Set Face",
            search_aliases=["regional face", "two people", "several faces", "face region", "face per prompt"],
            description=(
                "Gives one prompt a face of its own, or none, whatever FeedFace Apply Adapter says. With area or "
                "masked prompts this puts several people into one picture. Nodes behind it that change only the text, "
                "such as ConditioningZeroOut, keep the face: for a negative without one, put them before this node."
            ),
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt, positive or negative."),
                FaceSocket.Input(
                    "face", optional=True, tooltip="The prompt's face. Not connected: the prompt has no face."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Factor on what the adapter adds for this prompt, in place of the model's; 0 is no face.",
                ),
                io.Mask.Input("mask", optional=True, tooltip=_MASK_TIP),
                Adapter.Input(
                    "adapter",
                    optional=True,
                    tooltip="With two adapters on one model: the one this is for. Not connected: all.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The same prompt with this face.")],
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
        if adapter is not None and face is not None:
            adapter.check_face(face)
        control = FaceControl(face, strength, check_mask(mask, "FeedFace Set Face"))
        key = None if adapter is None else adapter.key
        # A new dict for each: prompts share what they were made from.
        return io.NodeOutput(
            [
                node_helpers.conditioning_set_values([entry], {CONTROLS: {**entry[1].get(CONTROLS, {}), key: control}})[
                    0
                ]
                for entry in conditioning
            ]
        )


NODES = [ApplyFeedFace, SetFace]
