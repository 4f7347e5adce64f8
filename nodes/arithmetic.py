"""Nodes that calculate with faces."""

from __future__ import annotations

from comfy_api.latest import io

from ..feedface_core import arithmetic
from ..feedface_core.conditioning import Face
from .checks import checked
from .encode import single_person
from .types import FaceSocket, make_schema

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


NODES = [InterpolateFaces, VaryFace, AddFaceDifference]
