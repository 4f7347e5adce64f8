"""Nodes for UniDiffuser v1, the model of the published FeedFace adapter."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io
from safetensors import safe_open

from ...feedface_core.files.released import PREFIX_SIGNATURE
from .. import folders
from ..checks import checked
from ..types import make_schema
from .model import UNCONDITIONAL_KEY, load_unidiffuser

_MODELS, _TEXT = "diffusion_models", "text_encoders"
_UVIT = "UniDiffuser's U-ViT, uvit_v1.pth"
_AUTO = "auto"
_DTYPES = {
    "default": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


def decoder_files() -> list[str]:
    """Names for the caption decoder's list, from both folders where it may lie."""
    return list(dict.fromkeys(name for kind in (_TEXT, _MODELS) for name in folder_paths.get_filename_list(kind)))


def find_prefix(uvit: Path, choice: str) -> Path | None:
    """The caption decoder's file; None when the U-ViT's own file carries ``encode_prefix``.

    Raises :class:`~feedface_core.errors.MissingFile` that names the file and the folders searched.
    """
    if choice != _AUTO:
        return Path(folders.find((_TEXT, _MODELS), choice, "UniDiffuser's caption decoder"))
    # Keys only. A PyTorch file never carries it; what is wrong with the file, the loader says.
    with suppress(Exception), safe_open(uvit, framework="pt") as file:
        if PREFIX_SIGNATURE in file.keys():  # noqa: SIM118
            return None
    names = [name for name in decoder_files() if Path(name).name.startswith("caption_decoder")]
    if not names:
        return Path(folders.find((_TEXT, _MODELS), "caption_decoder.pth", f"caption_decoder; or beside {uvit.name}"))
    paths = [Path(folders.find((_TEXT, _MODELS), name)) for name in names]
    return min(paths, key=lambda path: path.parent != uvit.parent)


class LoadUniDiffuser(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceLoadUniDiffuser",
            inputs=[
                io.Combo.Input("uvit", options=folders.choices(_MODELS)),
                io.Combo.Input("caption_decoder", options=[_AUTO, *decoder_files()], default=_AUTO),
                io.Combo.Input("weight_dtype", options=list(_DTYPES), default="default", optional=True),
            ],
            outputs=[io.Model.Output()],
            search_aliases=["unidiffuser", "uvit", "u-vit", "released feedface"],
            advanced=("caption_decoder", "weight_dtype"),
        )

    @classmethod
    def validate_inputs(cls, uvit: str) -> bool | str:
        """Before the graph runs: a missing or misplaced U-ViT, with the folders in the message. The caption decoder is
        looked for when the node runs, before anything is read."""
        return folders.found(_MODELS, uvit, _UVIT)

    @classmethod
    @checked
    def execute(cls, uvit: str, caption_decoder: str = _AUTO, weight_dtype: str = "default") -> io.NodeOutput:
        path = Path(folders.find(_MODELS, uvit, _UVIT))
        return io.NodeOutput(load_unidiffuser(path, find_prefix(path, caption_decoder), _DTYPES[weight_dtype]))

    @classmethod
    def fingerprint_inputs(cls, uvit: str, caption_decoder: str = _AUTO, weight_dtype: str = "default"):
        """A file that was replaced is read again: the U-ViT, or the caption decoder."""
        decoders = decoder_files() if caption_decoder == _AUTO else [caption_decoder]
        return folders.state(_MODELS, [uvit, *decoders]), folders.state(_TEXT, decoders), weight_dtype


class UnconditionalText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        seed = io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False)
        return make_schema(
            "FeedFaceUniDiffuserUnconditional",
            inputs=[seed],
            outputs=[io.Conditioning.Output()],
            search_aliases=["true unconditional", "unidiffuser negative", "no text"],
        )

    @classmethod
    @checked
    def execute(cls, seed: int) -> io.NodeOutput:
        # The states are never read: extra_conds draws the noise after the linear they would go through.
        return io.NodeOutput([[torch.zeros(1, 77, 768), {UNCONDITIONAL_KEY: seed}]])


NODES: list[type[io.ComfyNode]] = [LoadUniDiffuser, UnconditionalText]
