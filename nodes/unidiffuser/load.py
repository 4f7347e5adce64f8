"""Nodes for UniDiffuser v1, the model of the published FeedFace adapter."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ...feedface_core.errors import FeedFaceError
from ...feedface_core.files.released import PREFIX_SIGNATURE
from .. import folders
from ..types import make_schema
from .model import UNCONDITIONAL_KEY, load_unidiffuser

_NAME = "FeedFace Load UniDiffuser"
_MODELS, _TEXT = "diffusion_models", "text_encoders"
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


def find_file(name: str, kinds: tuple[str, ...], what: str) -> Path:
    """Full path of a file by its name in the lists of the model folders.

    Raises:
        FileNotFoundError: names the folders searched, and the folder where the file lies by mistake.
    """
    for kind in kinds:
        if path := folder_paths.get_full_path(kind, name):
            return Path(path)
    searched = [folder for kind in kinds for folder in folder_paths.get_folder_paths(kind)]
    missing = "nothing to choose from" if name.startswith(folders.NOTHING) else f"no file {name!r}"
    text = f"{_NAME}: {missing} ({what}); looked in {', '.join(searched)}."
    stray = find_stray(Path(name).name, kinds)
    text += f" It lies in {stray.parent}: move it to {searched[0]}" if stray else f" Put it in {searched[0]}"
    raise FileNotFoundError(f"{text}, and refresh the list (key R).")


def find_stray(name: str, kinds: tuple[str, ...]) -> Path | None:
    """A file of this name in a folder meant for other models."""
    # The last two hold no models of their own, or every file of others.
    for kind in folder_paths.folder_names_and_paths.keys() - {*kinds, "custom_nodes", "classifiers"}:
        for folder in folder_paths.get_folder_paths(kind):
            if (path := Path(folder) / name).is_file():
                return path
    return None


def find_prefix(uvit: Path, choice: str) -> Path | None:
    """The caption decoder's file; None when the U-ViT's own file carries ``encode_prefix``.

    Raises:
        FileNotFoundError: names the file and the folders searched.
    """
    if choice != _AUTO:
        return find_file(choice, (_TEXT, _MODELS), "UniDiffuser's caption decoder")
    if _carries_prefix(uvit):
        return None
    named = [
        Path(folder_paths.get_full_path_or_raise(kind, name))
        for kind in (_TEXT, _MODELS)
        for name in folder_paths.get_filename_list(kind)
        if Path(name).name.startswith("caption_decoder")
    ]
    found = [*sorted(uvit.parent.glob("caption_decoder*")), *named]
    return found[0] if found else find_file("caption_decoder.pth", (_TEXT, _MODELS), f"or beside {uvit.name}")


def _carries_prefix(uvit: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    if uvit.suffix.lower() not in (".safetensors", ".sft"):
        return False
    try:
        with safe_open(str(uvit), framework="pt") as file:
            return PREFIX_SIGNATURE in file.keys()  # noqa: SIM118
    except (SafetensorError, OSError):
        return False  # the loader says what is wrong with the file


class LoadUniDiffuser(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        dtypes = list(_DTYPES)
        return make_schema(
            "FeedFaceLoadUniDiffuser",
            inputs=[
                io.Combo.Input("uvit", options=folders.choices(_MODELS)),
                io.Combo.Input("caption_decoder", options=[_AUTO, *decoder_files()], default=_AUTO),
                io.Combo.Input("weight_dtype", options=dtypes, default="default", optional=True),
            ],
            outputs=[io.Model.Output()],
            search_aliases=["unidiffuser", "uvit", "u-vit", "released feedface"],
            advanced=("caption_decoder", "weight_dtype"),
        )

    @classmethod
    def validate_inputs(cls, uvit: str, caption_decoder: str = _AUTO) -> bool | str:
        """Before the graph runs: a missing or misplaced file, with the folders in the message."""
        try:
            find_prefix(find_file(uvit, (_MODELS,), "UniDiffuser's U-ViT, uvit_v1.pth"), caption_decoder)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, uvit: str, caption_decoder: str = _AUTO, weight_dtype: str = "default") -> io.NodeOutput:
        if weight_dtype not in _DTYPES:
            raise FeedFaceError(f"{_NAME}: weight_dtype is {weight_dtype!r}, expected one of {', '.join(_DTYPES)}")
        path = find_file(uvit, (_MODELS,), "UniDiffuser's U-ViT, uvit_v1.pth")
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
    def execute(cls, seed: int) -> io.NodeOutput:
        # The states are never read: extra_conds draws the noise after the linear they would go through.
        return io.NodeOutput([[torch.zeros(1, 77, 768), {UNCONDITIONAL_KEY: seed}]])


NODES: list[type[io.ComfyNode]] = [LoadUniDiffuser, UnconditionalText]
