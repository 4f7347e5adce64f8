"""The node that says how the strength of a face changes over the steps and over the blocks."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..feedface_core.faces.preview import draw_schedule
from ..feedface_core.schedule import CURVES, Schedule, curve_points, parse_points, parse_sites
from .checks import checked
from .types import ScheduleSocket, make_schema


class StrengthSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        factor = {"min": 0.0, "max": 10.0, "step": 0.05}
        return make_schema(
            "FeedFaceSchedule",
            inputs=[
                io.Combo.Input("curve", options=list(CURVES), default="linear"),
                io.Float.Input("first", default=0.0, **factor),
                io.Float.Input("last", default=1.0, **factor),
                io.String.Input("points", default="", optional=True, placeholder="0:0, 0.3:1, 1:0.5"),
                io.String.Input("sites", default="", optional=True, placeholder="in: 0.5, mid: 1"),
            ],
            outputs=[ScheduleSocket.Output(), io.Image.Output("preview")],
            search_aliases=["strength curve", "weight schedule", "face keyframes", "block weights", "layer weights"],
            is_output_node=True,  # so that the curve can be looked at without generating a picture
        )

    @classmethod
    @checked
    def execute(cls, curve: str, first: float, last: float, points: str = "", sites: str = "") -> io.NodeOutput:
        chosen = parse_points(points) if points.strip() else curve_points(curve, first, last)
        schedule = Schedule(chosen, parse_sites(sites))
        preview = draw_schedule(schedule).unsqueeze(0)
        return io.NodeOutput(schedule, preview, ui=ui.PreviewImage(preview, cls=cls))


NODES = [StrengthSchedule]
