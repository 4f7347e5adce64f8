"""Nodes that try every face with every background, and show what came out as one picture."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..feedface_core.conditioning import Face
from ..feedface_core.errors import FeedFaceError
from ..feedface_core.faces.grid import MOST, labelled_grid
from .checks import check_input, checked
from .encode import single_person
from .types import FaceSocket, make_schema

SOCKETS = 6


class Pairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        sockets = [
            FaceSocket.Input(f"{name}_{number}", optional=number > 1)
            for name in ("face", "background")
            for number in range(1, SOCKETS + 1)
        ]
        return make_schema(
            "FeedFacePairs",
            inputs=sockets,
            outputs=[
                FaceSocket.Output(is_output_list=True),
                FaceSocket.Output(is_output_list=True),
                io.Int.Output("columns"),
            ],
            search_aliases=["every combination", "cross product", "face mixer", "montage"],
        )

    @classmethod
    @checked
    def execute(cls, face_1: Face, background_1: Face, **more: Face | None) -> io.NodeOutput:
        faces, backgrounds = (
            [first, *(more[key] for key in sorted(more) if key.startswith(f"{name}_") and more[key] is not None)]
            for name, first in (("face", face_1), ("background", background_1))
        )
        single_person(*faces, *backgrounds)
        pairs = [(face, background) for face in faces for background in backgrounds]
        return io.NodeOutput([face for face, _ in pairs], [other for _, other in pairs], len(backgrounds))


class Grid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceGrid",
            inputs=[
                io.Image.Input("images"),
                io.Int.Input("columns", default=3, min=1, max=MOST),
                io.String.Input("row_labels", default="", optional=True, placeholder="Ann, Ben"),
                io.String.Input("column_labels", default="", optional=True, placeholder="garden, beach"),
            ],
            outputs=[io.Image.Output()],
            search_aliases=["contact sheet", "xy plot", "montage", "image grid", "labels"],
            is_input_list=True,  # pictures of several runs
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: list, columns: list, row_labels: list = (), column_labels: list = ()) -> io.NodeOutput:
        schema = cls.define_schema()
        try:
            single: dict[str, Any] = {"columns": columns, "row_labels": row_labels, "column_labels": column_labels}
            for one in schema.inputs[1:]:
                values = single[one.id]
                single[one.id] = check_input(one, values[0]) if len(values) else one.default
            pictures = [picture for batch in images for picture in check_input(schema.inputs[0], batch)]
            rows, heads = (
                [word.strip() for word in single[name].split(",")] if single[name].strip() else []
                for name in ("row_labels", "column_labels")
            )
            grid = labelled_grid(pictures, single["columns"], rows, heads)[None]
        except FeedFaceError as error:
            raise FeedFaceError(f"{schema.display_name}: {error}") from error
        return io.NodeOutput(grid, ui=ui.PreviewImage(grid, cls=cls))


NODES = [Pairs, Grid]
