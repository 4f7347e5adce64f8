"""From photos to face crops: the node that detects, chooses and crops faces."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..feedface_core.config import EncoderConfig
from ..feedface_core.faces import (
    AUTO,
    CROP_SCALE,
    CROP_SIZE,
    DETECTOR_NAMES,
    ORDERS,
    WHEN_NONE,
    Detector,
    FaceError,
    GivenBoxes,
    GivenMask,
    Selection,
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
from .compat import make_schema, model_folders
from .types import Adapter

NAME = "FeedFace Detect Faces"


class DetectFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="FeedFaceDetectFaces",
            display_name=NAME,
            search_aliases=["face detection", "face crop", "crop face", "mtcnn", "insightface", "bounding box"],
            description=(
                "Finds the faces in one or more photos and cuts out square crops for the face encoder. The"
                " preview shows every face with its number. InsightFace's model packs are for non-commercial"
                " research only; MTCNN is MIT-licensed and brings its weights along."
            ),
            inputs=_inputs(),
            outputs=[
                io.Image.Output("crops", display_name="crops", tooltip="One square crop for each face taken."),
                io.String.Output(
                    "face_boxes",
                    display_name="boxes",
                    tooltip="JSON: for each photo the list of the faces taken, in pixels (x0, y0, x1, y1).",
                ),
                io.Image.Output(
                    "preview", display_name="preview", tooltip="The photos with a numbered box on each face."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Which detector was used, its licence, what was found and what was taken.",
                ),
            ],
            is_output_node=True,  # so that the faces can be looked at without generating a picture
        )

    @classmethod
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
        crop_scale = encoder.crop_scale if crop_scale == CROP_SCALE else crop_scale
        crop_size = encoder.image_size if crop_size == CROP_SIZE else crop_size
        try:
            detectors = _detectors(image, detector, boxes, mask)
            chosen = parse_indexes(indexes)
            selections = []
            progress = comfy.utils.ProgressBar(len(detectors))
            for photo, finder, name in zip(image, detectors, _photo_names(len(image)), strict=True):
                comfy.model_management.throw_exception_if_processing_interrupted()
                selections.append(
                    select_from_photo(
                        photo, finder, order=order, indexes=chosen, min_size=min_size, when_none=when_none, name=name
                    )
                )
                progress.update(1)
            crops = _crops(image, selections, crop_scale, crop_size, encoder)
        except FaceError as error:
            raise type(error)(f"{NAME}: {error}") from error
        preview = torch.stack(
            [draw_faces(photo, found, crop_scale) for photo, found in zip(image, selections, strict=True)]
        )
        report = _report(detectors[0], selections)
        if adapter is not None:
            report += f"\ncrops: {crop_scale:g} × the box, {crop_size} pixels, border: {encoder.crop_border}"
        return io.NodeOutput(
            crops,
            faces_to_json([found.chosen_faces for found in selections]),
            preview,
            report,
            ui={**ui.PreviewImage(preview, cls=cls).as_dict(), **ui.PreviewText(report).as_dict()},
        )


def _inputs() -> list[io.Input]:
    return [
        io.Image.Input("image", tooltip="One photo, or a batch of photos; each is searched for faces on its own."),
        io.Combo.Input(
            "detector",
            options=[AUTO, *DETECTOR_NAMES],
            default=AUTO,
            tooltip="auto: InsightFace if its models are in models/insightface/models/<name>, else MTCNN."
            " InsightFace's models are for non-commercial research only; MTCNN is MIT-licensed. whole"
            " image: for photos that are cropped to the face already.",
        ),
        io.Combo.Input(
            "order",
            options=list(ORDERS),
            default="size",
            tooltip="How the faces are numbered. size: largest first. confidence: surest first. centre:"
            " nearest to the middle first. as found: as the detector, or your list of boxes, has them.",
        ),
        io.String.Input(
            "indexes",
            default="0",
            tooltip='Numbers of the faces to take from each photo, from 0: "0", "0, 2", "1-3", "all".',
        ),
        io.Int.Input(
            "min_size",
            default=32,
            min=0,
            max=4096,
            tooltip="Faces whose longer side has fewer pixels than this are left out and get no number.",
        ),
        io.Combo.Input(
            "when_none",
            options=list(WHEN_NONE),
            default="error",
            tooltip="What to do with a photo without a face: stop with an error, skip the photo, or take"
            " the whole image as the face.",
        ),
        io.Float.Input(
            "crop_scale",
            default=CROP_SCALE,
            min=0.5,
            max=4.0,
            step=0.05,
            optional=True,
            tooltip="Side of the square crop over the longer side of the face's box. Adapters are trained with 1.1"
            " unless they say otherwise: connect the adapter, and 1.1 means what it was trained with.",
        ),
        io.Int.Input(
            "crop_size",
            default=CROP_SIZE,
            min=32,
            max=1024,
            step=8,
            optional=True,
            tooltip="Side of the crops in pixels: the image size of the adapter's encoder, usually 224. With an"
            " adapter connected, 224 means its own.",
        ),
        io.String.Input(
            "boxes",
            default="",
            optional=True,
            placeholder="boxes of your own, e.g. [[40, 30, 120, 130]]",
            tooltip="Boxes of your own as JSON, x0, y0, x1, y1 in pixels, instead of a detector: [[40, 30,"
            " 120, 130]] for one photo, one such list for each photo of a batch, or the output boxes of"
            " this node.",
        ),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="Marks the faces by hand, instead of a detector: each connected region is one face. As"
            " large as the photo; one for all photos or one for each.",
        ),
        Adapter.Input(
            "adapter",
            optional=True,
            tooltip="The adapter that the crops are for: they are cut as in its training (scale, size, border)."
            " Needed only for adapters that were trained with other crops than 1.1 times the box.",
        ),
    ]


def _detectors(image: Tensor, name: str, boxes: str, mask: Tensor | None) -> list[Detector]:
    """One detector a photo; the same one for all unless boxes or masks are given."""
    if image.ndim != 4 or len(image) == 0:
        raise FaceError(f"image: expected a batch of photos (B, H, W, 3), found the shape {tuple(image.shape)}")
    count = len(image)
    if boxes.strip() and mask is not None:
        raise FaceError("both boxes and a mask are given; remove one of them")
    if boxes.strip():
        return [GivenBoxes(faces) for faces in faces_from_json(boxes, count)]
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[-2:])
        if len(mask) not in (1, count):
            raise FaceError(f"mask: {len(mask)} masks for {count} photos; expected one, or one for each photo")
        return [GivenMask(one) for one in mask.expand(count, -1, -1)]
    return [load_detector(name, insightface_roots=model_folders("insightface"))] * count


def _photo_names(count: int) -> list[str]:
    return ["image"] if count == 1 else [f"photo {index + 1} of {count}" for index in range(count)]


def _crops(image: Tensor, selections: list[Selection], scale: float, size: int, encoder: EncoderConfig) -> Tensor:
    """All crops ``(N, size, size, 3)``, photo by photo."""
    crops = [
        crop_face(photo, face.box, size, crop_scale_of(face, scale), encoder.crop_fill, encoder.crop_border)
        for photo, found in zip(image, selections, strict=True)
        for face in found.chosen_faces
    ]
    if not crops:
        raise FaceError(
            f"no face was found in any of the {len(selections)} photo(s), and all of them were skipped:"
            " there is nothing left to crop. Use other photos, another detector, or a lower min_size"
        )
    return torch.stack(crops)


def _report(detector: Detector, selections: list[Selection]) -> str:
    lines = [f"detector: {detector.description}"]
    lines += [
        f"{name}: {found.describe()}" for name, found in zip(_photo_names(len(selections)), selections, strict=True)
    ]
    return "\n".join(lines)


NODES = [DetectFaces]
