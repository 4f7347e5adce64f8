"""The node that puts several people into one picture."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..feedface_core.conditioning import Face, People
from ..feedface_core.errors import FeedFaceError
from ..feedface_core.faces.regions import BOX_SCALE, box_masks, column_masks, draw_regions, match_faces
from .checks import checked
from .encode import single_person
from .types import FaceSocket, make_schema

COLUMNS, BOXES, MASKS = "columns", "boxes", "masks"


class Regions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        size = {"default": 512, "min": 16, "max": 16384, "step": 8}
        return make_schema(
            "FeedFaceRegions",
            inputs=[
                FaceSocket.Input("face_1"),
                FaceSocket.Input("face_2"),
                *(FaceSocket.Input(f"face_{number}", optional=True) for number in range(3, 7)),
                io.Combo.Input("regions", options=[COLUMNS, BOXES, MASKS], default=COLUMNS),
                io.Int.Input("width", **size),
                io.Int.Input("height", **size),
                io.String.Input("boxes", default="", optional=True, placeholder="[[0, 0, 200, 512], …] in pixels"),
                io.Float.Input("box_scale", default=BOX_SCALE, min=0.1, max=10.0, step=0.1, optional=True),
                io.Mask.Input("masks", optional=True),
                FaceSocket.Input("found", optional=True),
            ],
            outputs=[FaceSocket.Output(), io.Image.Output("preview"), io.String.Output("report")],
            search_aliases=["several people", "two people", "group", "couple", "regional face", "face regions"],
            is_output_node=True,  # so that the regions can be looked at without generating a picture
        )

    @classmethod
    @checked
    def execute(
        cls,
        face_1: Face,
        face_2: Face,
        regions: str,
        width: int,
        height: int,
        boxes: str = "",
        box_scale: float = BOX_SCALE,
        masks: Tensor | None = None,
        found: Face | None = None,
        **more: Face | None,
    ) -> io.NodeOutput:
        faces = [face_1, face_2, *(more[key] for key in sorted(more) if more[key] is not None)]
        single_person(*faces, *([] if found is None else [found]))
        if regions == COLUMNS:
            areas = column_masks(len(faces), height, width)
        elif regions == BOXES:
            areas = box_masks(boxes, box_scale, height, width)
        elif masks is None:
            raise FeedFaceError("regions is masks, but no masks are connected")
        else:
            areas = masks
        if len(areas) != len(faces):
            raise FeedFaceError(f"{len(areas)} regions for {len(faces)} faces; give one for each")
        order, lines = list(range(len(faces))), []
        if found is not None:
            order, likeness = match_faces(faces, found)
            lines = [f"region {n + 1}: face {i + 1}, likeness {likeness[n]:.3f}" for n, i in enumerate(order)]
        people = People(tuple(faces[index] for index in order), areas)
        preview = draw_regions(areas, [f"face {index + 1}" for index in order]).unsqueeze(0)
        report = "\n".join(lines or [f"region {n + 1}: face {n + 1}" for n in range(len(faces))])
        shown = {**ui.PreviewImage(preview, cls=cls).as_dict(), **ui.PreviewText(report).as_dict()}
        return io.NodeOutput(people, preview, report, ui=shown)


NODES = [Regions]
