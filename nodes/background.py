"""The node that encodes a photo without its face, for adapters with a second stream."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..feedface_core.conditioning import Face
from ..feedface_core.errors import FeedFaceError
from ..feedface_core.faces import faces_from_json, mask_boxes
from ..feedface_core.faces.background import background_picture
from .adapter import LoadedAdapter
from .checks import checked
from .types import Adapter, FaceSocket, make_schema


class EncodeBackground(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceEncodeBackground",
            inputs=[
                Adapter.Input("adapter"),
                io.Image.Input("image"),
                io.String.Input("boxes", default="", placeholder="from FeedFace Detect Faces, or [[40, 30, 120, 130]]"),
                io.Mask.Input("mask", optional=True),
            ],
            outputs=[FaceSocket.Output(), io.Image.Output("preview")],
            search_aliases=["background", "face mixer", "scene reference", "photo without face", "style reference"],
        )

    @classmethod
    @checked
    def execute(cls, adapter: LoadedAdapter, image: Tensor, boxes: str, mask: Tensor | None = None) -> io.NodeOutput:
        if len(adapter.streams) < 2:
            raise FeedFaceError(f"{adapter.name} has no second stream for a background; load an adapter of that kind")
        if bool(boxes.strip()) == (mask is not None):
            raise FeedFaceError("give either boxes of the faces (from FeedFace Detect Faces) or a mask of them")
        if mask is None:
            faces = [[face.box for face in photo] for photo in faces_from_json(boxes, len(image))]
        else:
            if len(mask) not in (1, len(image)) or mask.shape[1:] != image.shape[1:3]:
                size = f"{len(image)} photos of {image.shape[2]} × {image.shape[1]}"
                found = f"{len(mask)} of {mask.shape[2]} × {mask.shape[1]}"
                raise FeedFaceError(f"mask: {found} for {size} pixels; expected one, or one for each photo")
            faces = [mask_boxes(one) for one in mask.expand(len(image), -1, -1)]
        config = adapter.streams[1].config.encoder
        pictures = torch.stack(
            [
                background_picture(photo, own, config.image_size, config.crop_scale, config.crop_fill)
                for photo, own in zip(image, faces, strict=True)
            ]
        )
        hidden = adapter.encode(pictures, "background")
        background = Face(hidden, (), "average", adapter.streams[1].encoded_by)
        return io.NodeOutput(background, pictures, ui=ui.PreviewImage(pictures, cls=cls))


NODES = [EncodeBackground]
