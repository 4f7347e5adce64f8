"""The node that finds faces in photos and cuts them out."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..feedface_core.config import EncoderConfig
from ..feedface_core.errors import FeedFaceError
from ..feedface_core.faces import (
    AUTO,
    CROP_SCALE,
    CROP_SIZE,
    DETECTOR_NAMES,
    ORDERS,
    WHEN_NONE,
    Detector,
    GivenBoxes,
    GivenMask,
    crop_face,
    crop_scale_of,
    draw_faces,
    faces_from_json,
    faces_to_json,
    load_detector,
    parse_indexes,
    select_from_photo,
)
from .adapter import LoadedAdapter
from .checks import checked
from .folders import model_folders
from .types import Adapter, make_schema


class DetectFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        example = "boxes of your own, e.g. [[40, 30, 120, 130]]"
        return make_schema(
            "FeedFaceDetectFaces",
            inputs=[
                io.Image.Input("image"),
                io.Combo.Input("detector", options=[AUTO, *DETECTOR_NAMES], default=AUTO),
                io.Combo.Input("order", options=list(ORDERS), default="size"),
                io.String.Input("indexes", default="0"),
                io.Int.Input("min_size", default=32, min=0, max=4096),
                io.Combo.Input("when_none", options=list(WHEN_NONE), default="error"),
                io.Float.Input("crop_scale", default=CROP_SCALE, min=0.5, max=4.0, step=0.05, optional=True),
                io.Int.Input("crop_size", default=CROP_SIZE, min=32, max=1024, step=8, optional=True),
                io.String.Input("boxes", default="", optional=True, placeholder=example),
                io.Mask.Input("mask", optional=True),
                Adapter.Input("adapter", optional=True),
            ],
            outputs=[
                io.Image.Output("crops"),
                io.String.Output("face_boxes"),
                io.Image.Output("preview"),
                io.String.Output("report"),
            ],
            search_aliases=[
                *("face detection", "face crop", "crop face", "mtcnn", "insightface", "bounding box"),
                *("find face", "find person", "portrait photo"),
            ],
            advanced=("min_size", "crop_scale", "crop_size", "boxes"),
            is_output_node=True,  # so that the faces can be looked at without generating a picture
        )

    @classmethod
    @checked
    def execute(
        cls,
        image: Tensor,
        detector: str = AUTO,
        order: str = "size",
        indexes: str = "0",
        min_size: int = 32,
        when_none: str = "error",
        crop_scale: float = CROP_SCALE,
        crop_size: int = CROP_SIZE,
        boxes: str = "",
        mask: Tensor | None = None,
        adapter: LoadedAdapter | None = None,
    ) -> io.NodeOutput:
        encoder = EncoderConfig() if adapter is None else adapter.config.encoder
        # A widget that was not touched follows the adapter.
        scale = encoder.crop_scale if crop_scale == CROP_SCALE else crop_scale
        size = encoder.image_size if crop_size == CROP_SIZE else crop_size
        detectors, chosen = _detectors(image, detector, boxes, mask), parse_indexes(indexes)
        names = ["image"] if len(image) == 1 else [f"photo {n + 1} of {len(image)}" for n in range(len(image))]
        choice = {"order": order, "indexes": chosen, "min_size": min_size, "when_none": when_none}
        selections, progress = [], comfy.utils.ProgressBar(len(detectors))
        for photo, finder, name in zip(image, detectors, names, strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            selections.append(select_from_photo(photo, finder, name=name, **choice))
            progress.update(1)
        pairs = list(zip(image, selections, strict=True))
        crops = [
            crop_face(photo, face.box, size, crop_scale_of(face, scale), encoder.crop_fill, encoder.crop_border)
            for photo, selection in pairs
            for face in selection.chosen_faces
        ]
        if not crops:
            raise FeedFaceError(
                f"no face was found in any of the {len(image)} photo(s), and all of them were skipped: there is "
                "nothing left to crop. Use other photos, another detector, or a lower min_size"
            )
        preview = torch.stack([draw_faces(photo, selection, scale) for photo, selection in pairs])
        lines = [f"detector: {detectors[0].description}"]
        lines += [f"{name}: {selection.describe()}" for name, selection in zip(names, selections, strict=True)]
        if adapter is not None:
            lines.append(f"crops: {scale:g} × the box, {size} pixels, border: {encoder.crop_border}")
        report = "\n".join(lines)
        return io.NodeOutput(
            torch.stack(crops),
            faces_to_json([selection.chosen_faces for selection in selections]),
            preview,
            report,
            ui={**ui.PreviewImage(preview, cls=cls).as_dict(), **ui.PreviewText(report).as_dict()},
        )


def _detectors(image: Tensor, name: str, boxes: str, mask: Tensor | None) -> list[Detector]:
    """One detector a photo; the same one for all unless boxes or masks are given."""
    count = len(image)
    if boxes.strip() and mask is not None:
        raise FeedFaceError("both boxes and a mask are given; remove one of them")
    if boxes.strip():
        return [GivenBoxes(faces) for faces in faces_from_json(boxes, count)]
    if mask is not None:
        if len(mask) not in (1, count):
            raise FeedFaceError(f"mask: {len(mask)} masks for {count} photos; expected one, or one for each photo")
        return [GivenMask(one) for one in mask.expand(count, -1, -1)]
    return [load_detector(name, insightface_roots=model_folders("insightface"))] * count


NODES = [DetectFaces]
