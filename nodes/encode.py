"""Nodes that turn face crops into a face, and keep faces on disk."""

from __future__ import annotations

from itertools import groupby

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..feedface_core.conditioning import Face, mix_faces
from ..feedface_core.config import COMBINATIONS
from ..feedface_core.files.face_file import load_face, save_face
from . import folders
from .adapter import LoadedAdapter
from .compat import make_schema
from .types import Adapter, FaceSocket

_DEFAULT = "adapter's default"
_COMBINATION_TIP = (
    "How several photos become one face. concat: the model attends to all of them at once (the published method). "
    "average: the mean of their tokens. weighted_average: the mean by weight."
)

_FOR = "For FeedFace Apply Adapter, FeedFace Set Face, FeedFace Combine Faces and FeedFace Save Face."


def parse_weights(text: str, count: int, node: str) -> tuple[float, ...]:
    """``"1, 0.5"`` → one weight for each reference; an empty text gives all the weight 1.

    Raises:
        ValueError: not numbers, or another number of them.
    """
    if not text.strip():
        return (1.0,) * count
    try:
        weights = tuple(float(part) for part in text.replace(";", ",").split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{node}: weights {text!r} are not numbers separated by commas") from error
    if len(weights) != count:
        raise ValueError(f"{node}: {len(weights)} weights ({text!r}) for {count} crops; give one for each, or none")
    return weights


class EncodeFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="FeedFaceEncodeFaces",
            display_name="FeedFace Encode Faces",
            search_aliases=["encode face", "face embedding", "clip vision face", "reference photos"],
            description="Encodes one or several face crops of a person with the adapter's CLIP encoder.",
            inputs=[
                Adapter.Input("adapter", tooltip="Its encoder is used; the face fits every adapter with the same one."),
                io.Image.Input("crops", tooltip="Square face crops from FeedFace Detect Faces, all of one person."),
                *(
                    io.Image.Input(
                        f"crops_{number}", optional=True, tooltip="Crops from one more photo of this person."
                    )
                    for number in range(2, 6)
                ),
                io.String.Input(
                    "weights",
                    default="",
                    optional=True,
                    tooltip="A weight for each crop, in the order of the inputs, separated by commas, e.g. "
                    "1, 0.5. Empty: all equal. 0 leaves a photo out.",
                ),
                io.Combo.Input(
                    "combination",
                    options=[_DEFAULT, *COMBINATIONS],
                    default=_DEFAULT,
                    optional=True,
                    tooltip=_COMBINATION_TIP,
                ),
                io.Int.Input(
                    "max_references",
                    default=5,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Only the first so many crops are used. The published model was trained for 5; "
                    "more cost time at every step.",
                ),
            ],
            outputs=[FaceSocket.Output(display_name="face", tooltip=_FOR)],
        )

    @classmethod
    def execute(
        cls,
        adapter: LoadedAdapter,
        crops: Tensor,
        weights: str = "",
        combination: str = _DEFAULT,
        max_references: int = 5,
        crops_2: Tensor | None = None,
        crops_3: Tensor | None = None,
        crops_4: Tensor | None = None,
        crops_5: Tensor | None = None,
    ) -> io.NodeOutput:
        batches = [crops, *(more for more in (crops_2, crops_3, crops_4, crops_5) if more is not None)]
        single = [crop for batch in batches for crop in check_crops(batch).split(1)]
        given = parse_weights(weights, len(single), "FeedFace Encode Faces")[:max_references]
        combination = adapter.config.combination if combination == _DEFAULT else combination
        hidden = torch.cat([adapter.encode(batch) for batch in same_size(single[:max_references])])
        text = f"{hidden.shape[0]} of {len(single)} crops encoded, {combination}, weights {list(given)}"
        return io.NodeOutput(Face(hidden, given, combination, adapter.encoder_fingerprint), ui=ui.PreviewText(text))


def same_size(crops: list[Tensor]) -> list[Tensor]:
    """Neighbours of one size joined into batches, in the order given."""
    return [torch.cat(list(group)) for _, group in groupby(crops, key=lambda crop: crop.shape[1:3])]


def check_crops(crops: Tensor) -> Tensor:
    """Crops as ``(N, H, W, 3)``: grey becomes RGB, alpha is dropped. Raises ``ValueError`` that names the node."""
    node = "FeedFace Encode Faces"
    if crops is None or crops.ndim != 4 or crops.shape[0] == 0:
        found = "nothing" if crops is None else f"shape {tuple(crops.shape)}"
        raise ValueError(
            f"{node}: crops must be an image batch (N, H, W, 3), got {found}; connect FeedFace Detect Faces"
        )
    if crops.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{node}: crops have {crops.shape[-1]} channels, expected 3 (RGB), 1 (grey) or 4 (RGBA)")
    if not torch.isfinite(crops).all():
        raise ValueError(f"{node}: crops hold NaN or infinite pixels; check the node that made them")
    if min(crops.shape[1:3]) < 16:
        raise ValueError(
            f"{node}: crops are {crops.shape[2]} × {crops.shape[1]} pixels, too small for a face; use a larger photo"
        )
    return crops.expand(-1, -1, -1, 3) if crops.shape[-1] == 1 else crops[..., :3]


class CombineFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="FeedFaceCombineFaces",
            display_name="FeedFace Combine Faces",
            search_aliases=["merge faces", "mix faces", "blend faces", "face arithmetic", "face average"],
            description=(
                "Puts the references of two faces together: more photos of one person, or a blend of two people."
            ),
            inputs=[
                FaceSocket.Input("face_a", tooltip="The first face."),
                FaceSocket.Input("face_b", tooltip="The second face, from the same encoder."),
                io.Float.Input(
                    "share_b",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the second face: 0 is face A alone, 1 is face B alone.",
                ),
                io.Combo.Input(
                    "combination",
                    options=list(COMBINATIONS),
                    default="weighted_average",
                    tooltip=_COMBINATION_TIP + " For a blend of two people, weighted_average.",
                ),
            ],
            outputs=[FaceSocket.Output(display_name="face", tooltip=_FOR)],
        )

    @classmethod
    def execute(cls, face_a: Face, face_b: Face, share_b: float, combination: str) -> io.NodeOutput:
        try:
            return io.NodeOutput(mix_faces(face_a, face_b, share_b, combination))
        except ValueError as error:
            raise ValueError(f"FeedFace Combine Faces: {error}") from error


class SaveFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="FeedFaceSaveFace",
            display_name="FeedFace Save Face",
            search_aliases=["save face", "store face", "face library", "face model"],
            description="Saves an encoded face to models/feedface/faces, to be used again without its photos.",
            inputs=[
                FaceSocket.Input("face", tooltip="From FeedFace Encode Faces."),
                io.String.Input(
                    "name", default="person", tooltip="File name without extension; sub-folders are allowed."
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Off: a face of that name is kept, and the new one gets a number.",
                ),
            ],
            outputs=[FaceSocket.Output(display_name="face", tooltip="The same face.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, face: Face, name: str, overwrite: bool) -> io.NodeOutput:
        path = folders.face_path(name)
        number = 2
        while path.exists() and not overwrite:
            path = folders.face_path(f"{name.strip().removesuffix('.safetensors')}_{number}")
            number += 1
        save_face(path, face)
        return io.NodeOutput(face, ui=ui.PreviewText(f"{face.hidden.shape[0]} references saved as {path.name}"))


class LoadFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="FeedFaceLoadFace",
            display_name="FeedFace Load Face",
            search_aliases=["load face", "face library", "saved face"],
            description="Loads a face saved by FeedFace Save Face from models/feedface/faces.",
            inputs=[
                io.Combo.Input(
                    "face_name",
                    options=folders.choices(folders.face_files(), "feedface/faces"),
                    tooltip="A face in models/feedface/faces; press R after saving a new one.",
                )
            ],
            outputs=[FaceSocket.Output(display_name="face", tooltip=_FOR)],
        )

    @classmethod
    def validate_inputs(cls, face_name: str) -> bool | str:
        try:
            folders.find(folders.FACES, face_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, face_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_face(folders.find(folders.FACES, face_name)))

    @classmethod
    def fingerprint_inputs(cls, face_name: str):
        return folders.state(folders.FACES, [face_name])


NODES = [EncodeFaces, CombineFaces, SaveFace, LoadFace]
