"""Nodes that calculate with faces."""

from __future__ import annotations

import json
from typing import Any

import numpy
import torch
from comfy_api.latest import io
from torch import Tensor

from ..feedface_core import arithmetic
from ..feedface_core.conditioning import Face
from ..feedface_core.errors import FeedFaceError, shorten
from .adapter import LoadedAdapter
from .checks import checked
from .encode import single_person
from .types import Adapter, FaceSocket, make_schema

LINEAR, SPHERICAL = "linear", "spherical"


class InterpolateFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceInterpolateFaces",
            inputs=[
                FaceSocket.Input("face_a"),
                FaceSocket.Input("face_b"),
                io.Int.Input("steps", default=5, min=1, max=256),
                io.Float.Input("first", default=0.0, min=-1.0, max=2.0, step=0.05),
                io.Float.Input("last", default=1.0, min=-1.0, max=2.0, step=0.05),
                io.Combo.Input("path", options=[LINEAR, SPHERICAL], default=SPHERICAL),
            ],
            outputs=[FaceSocket.Output(is_output_list=True)],
            search_aliases=["morph faces", "face slerp", "face lerp", "between two faces", "blend faces"],
        )

    @classmethod
    @checked
    def execute(
        cls, face_a: Face, face_b: Face, steps: int, first: float, last: float, path: str = SPHERICAL
    ) -> io.NodeOutput:
        single_person(face_a, face_b)
        shares = [first + (last - first) * step / max(steps - 1, 1) for step in range(steps)]
        return io.NodeOutput([arithmetic.interpolate(face_a, face_b, share, path == SPHERICAL) for share in shares])


class VaryFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceVaryFace",
            inputs=[
                FaceSocket.Input("face"),
                io.Float.Input("amount", default=0.3, min=0.0, max=4.0, step=0.05),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
            ],
            outputs=[FaceSocket.Output()],
            search_aliases=["face variation", "face noise", "similar person", "sibling"],
        )

    @classmethod
    @checked
    def execute(cls, face: Face, amount: float, seed: int) -> io.NodeOutput:
        single_person(face)
        return io.NodeOutput(arithmetic.add_noise(face, amount, seed))


class AddFaceDifference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceAddDifference",
            inputs=[
                FaceSocket.Input("face"),
                FaceSocket.Input("plus"),
                FaceSocket.Input("minus"),
                io.Float.Input("amount", default=1.0, min=-4.0, max=4.0, step=0.05),
            ],
            outputs=[FaceSocket.Output()],
            search_aliases=["face arithmetic", "face vector", "expression transfer", "add smile"],
        )

    @classmethod
    @checked
    def execute(cls, face: Face, plus: Face, minus: Face, amount: float) -> io.NodeOutput:
        single_person(face, plus, minus)
        return io.NodeOutput(arithmetic.add_difference(face, plus, minus, amount))


class RandomFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceRandomFace",
            inputs=[
                Adapter.Input("adapter"),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
                io.Float.Input("variety", default=1.0, min=0.0, max=3.0, step=0.05),
            ],
            outputs=[FaceSocket.Output()],
            search_aliases=["invented face", "random character", "consistent character", "new person", "face seed"],
        )

    @classmethod
    @checked
    def execute(cls, adapter: LoadedAdapter, seed: int, variety: float) -> io.NodeOutput:
        if adapter.statistics is None:
            raise FeedFaceError(
                f"{adapter.name} does not hold the statistics of faces from which random ones are drawn; export it "
                "again with python -m trainer.export RUN --statistics 1000"
            )
        return io.NodeOutput(adapter.statistics.draw(seed % 2**63, variety, adapter.streams[0].encoded_by))


class FaceFromVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceFaceFromVector",
            inputs=[Adapter.Input("adapter"), io.AnyType.Input("vector")],
            outputs=[FaceSocket.Output()],
            search_aliases=["face embedding", "arcface", "insightface embedding", "face vector", "faceid"],
        )

    @classmethod
    @checked
    def execute(cls, adapter: LoadedAdapter, vector: Any) -> io.NodeOutput:
        config = adapter.config.encoder
        if config.tokens != 1:
            raise FeedFaceError(
                f"{adapter.name} takes {config.tokens} tokens for a face, not one vector; use FeedFace Encode Faces"
            )
        return io.NodeOutput(
            Face(vectors_from(vector, config.width)[:, None], (), "average", adapter.streams[0].encoded_by)
        )


def vectors_from(value: Any, width: int) -> Tensor:
    """Vectors ``(N, width)`` from what another node gives: numbers as JSON, a list, an array or a tensor.

    Raises:
        FeedFaceError: something else, or numbers of another width.
    """
    try:
        if isinstance(value, str):
            value = json.loads(value)
        vectors = torch.as_tensor(numpy.asarray(value, dtype=numpy.float32))
    except (ValueError, TypeError, RecursionError, OverflowError):
        vectors = torch.empty(0)
    if not 1 <= vectors.ndim <= 3 or vectors.shape[-1] != width or not 0 < vectors.numel() <= 1024 * width:
        raise FeedFaceError(f"vector is {shorten(value)}, expected {width} numbers, or a list of such vectors")
    return vectors.reshape(-1, width).clone()


NODES = [InterpolateFaces, VaryFace, AddFaceDifference, RandomFace, FaceFromVector]
