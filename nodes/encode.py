"""Nodes that turn face crops into a face, and keep faces on disk."""

from __future__ import annotations

import math
from itertools import groupby

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..feedface_core.arithmetic import mix_faces
from ..feedface_core.conditioning import Face, People
from ..feedface_core.config import COMBINATIONS
from ..feedface_core.errors import FeedFaceError
from ..feedface_core.files.face_file import read_face, save_face
from . import folders
from .adapter import LoadedAdapter
from .checks import checked
from .types import Adapter, FaceSocket, make_schema

_DEFAULT = "adapter's default"
MAX_WEIGHT = 1e6


def parse_weights(text: str, count: int) -> tuple[float, ...]:
    """``"1, 0.5"`` → one weight for each reference; an empty text gives all the weight 1.

    Raises:
        FeedFaceError: not finite numbers of at least 0, or another number of them.
    """
    if not text.strip():
        return (1.0,) * count
    try:
        if "_" in text or not text.isascii():  # 1_0 and digits of other scripts, which Python reads
            raise ValueError
        weights = tuple(float(word) for word in text.replace(";", ",").split(","))
    except ValueError:
        weights = (math.nan,)
    if not all(0.0 <= weight <= MAX_WEIGHT for weight in weights):
        raise FeedFaceError(f"weights {text!r:.80} are not numbers of 0 to {MAX_WEIGHT:g} separated by commas")
    if len(weights) != count:
        raise FeedFaceError(f"{len(weights)} weights ({text!r:.80}) for {count} crops; give one for each, or none")
    return weights


def single_person(*faces: Face | People) -> None:
    """Raises :class:`FeedFaceError` for what FeedFace Regions gives."""
    if any(isinstance(face, People) for face in faces):
        raise FeedFaceError("the face is several people with regions; connect the face of one person")


class EncodeFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceEncodeFaces",
            inputs=[
                Adapter.Input("adapter"),
                io.Image.Input("crops"),
                *(io.Image.Input(f"crops_{number}", optional=True) for number in range(2, 6)),
                io.String.Input("weights", default="", optional=True),
                io.Combo.Input("combination", options=[_DEFAULT, *COMBINATIONS], default=_DEFAULT, optional=True),
                io.Int.Input("max_references", default=5, min=1, max=64, optional=True),
            ],
            outputs=[FaceSocket.Output()],
            search_aliases=[
                *("encode face", "face embedding", "clip vision face", "reference photos"),
                *("person", "likeness", "portrait", "faceid"),
            ],
            advanced=("max_references",),
        )

    @classmethod
    @checked
    def execute(
        cls,
        adapter: LoadedAdapter,
        crops: Tensor,
        weights: str = "",
        combination: str = _DEFAULT,
        max_references: int = 5,
        **more: Tensor | None,
    ) -> io.NodeOutput:
        batches = [crops, *(more[key] for key in sorted(more) if more[key] is not None)]
        single = [crop for batch in batches for crop in batch[..., :3].expand(-1, -1, -1, 3).split(1)]  # RGB
        for crop in single:
            if min(crop.shape[1:3]) < 16:
                size = f"{crop.shape[2]} × {crop.shape[1]}"
                raise FeedFaceError(f"crops are {size} pixels, too small for a face; use a larger photo")
        used, shares = single[:max_references], parse_weights(weights, len(single))[:max_references]
        combination = adapter.config.combination if combination == _DEFAULT else combination
        # Neighbours of one size are encoded together.
        groups = [torch.cat(list(group)) for _, group in groupby(used, key=lambda crop: crop.shape[1:3])]
        hidden = torch.cat([adapter.encode(group) for group in groups])
        text = f"{len(hidden)} of {len(single)} crops encoded, {combination}, weights {list(shares)}"
        return io.NodeOutput(Face(hidden, shares, combination, adapter.encoder_fingerprint), ui=ui.PreviewText(text))


class CombineFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceCombineFaces",
            inputs=[
                FaceSocket.Input("face_a"),
                FaceSocket.Input("face_b"),
                io.Float.Input("share_b", default=0.5, min=0.0, max=1.0, step=0.05),
                io.Combo.Input("combination", options=list(COMBINATIONS), default="weighted_average"),
            ],
            outputs=[FaceSocket.Output()],
            search_aliases=["merge faces", "mix faces", "blend faces", "face arithmetic", "face average", "morph"],
        )

    @classmethod
    @checked
    def execute(cls, face_a: Face, face_b: Face, share_b: float, combination: str) -> io.NodeOutput:
        single_person(face_a, face_b)
        return io.NodeOutput(mix_faces(face_a, face_b, share_b, combination))


class SaveFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceSaveFace",
            inputs=[
                FaceSocket.Input("face"),
                io.String.Input("name", default="person"),
                io.Boolean.Input("overwrite", default=False),
                io.String.Input("consent", default="", optional=True),
            ],
            outputs=[FaceSocket.Output()],
            search_aliases=[
                "save face",
                "store face",
                "face library",
                "face model",
                "save person",
                "consistent character",
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, face: Face, name: str, overwrite: bool, consent: str = "") -> io.NodeOutput:
        single_person(face)
        path, number = folders.face_path(name), 2
        while path.exists() and not overwrite:
            path = folders.face_path(f"{name.strip().removesuffix('.safetensors')}_{number}")
            number += 1
        save_face(path, face, consent)
        return io.NodeOutput(face, ui=ui.PreviewText(f"{len(face.hidden)} references saved as {path.name}"))


class LoadFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceLoadFace",
            inputs=[io.Combo.Input("face_name", options=folders.choices(folders.FACES, "feedface/faces"))],
            outputs=[FaceSocket.Output()],
            search_aliases=["load face", "face library", "saved face", "load person", "consistent character"],
        )

    @classmethod
    def validate_inputs(cls, face_name: str) -> bool | str:
        return folders.found(folders.FACES, face_name)

    @classmethod
    @checked
    def execute(cls, face_name: str) -> io.NodeOutput:
        face, consent = read_face(folders.find(folders.FACES, face_name))
        return io.NodeOutput(face, ui=ui.PreviewText(f"consent: {consent}") if consent else None)

    @classmethod
    def fingerprint_inputs(cls, face_name: str):
        return folders.state(folders.FACES, [face_name])


NODES = [EncodeFaces, CombineFaces, SaveFace, LoadFace]
