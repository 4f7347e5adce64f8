"""Nodes for UniDiffuser v1, the model of the published FeedFace adapter."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io
from safetensors import SafetensorError, safe_open

from ...feedface_core.files.released import PREFIX_SIGNATURE
from .. import folders
from ..compat import make_schema
from ..folders import choices, describe_missing
from . import model as unidiffuser_model

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
#: Kinds of model folders that hold no models of their own, or every file of others.
_NOT_SEARCHED = {"custom_nodes", "classifiers"}


def decoder_files() -> list[str]:
    """Names for the caption decoder's list, from both folders where it may lie."""
    names = [*folder_paths.get_filename_list(_TEXT), *folder_paths.get_filename_list(_MODELS)]
    return list(dict.fromkeys(names))


def find_file(name: str, kinds: tuple[str, ...], what: str) -> Path:
    """Full path of a file by its name in the lists of the model folders.

    Raises:
        FileNotFoundError: names the folders searched, and the folder where the file lies by mistake.
    """
    for kind in kinds:
        path = folder_paths.get_full_path(kind, name)
        if path is not None:
            return Path(path)
    searched = [folder for kind in kinds for folder in folder_paths.get_folder_paths(kind)]
    text = f"{_NAME}: {describe_missing(name)} ({what}); looked in {', '.join(searched)}."
    stray = find_stray(Path(name).name, kinds)
    text += f" It lies in {stray.parent}: move it to {searched[0]}" if stray else f" Put it in {searched[0]}"
    raise FileNotFoundError(f"{text}, and refresh the list (key R).")


def find_stray(name: str, kinds: tuple[str, ...]) -> Path | None:
    """A file of this name in a folder meant for other models."""
    for kind in folder_paths.folder_names_and_paths.keys() - {*kinds, *_NOT_SEARCHED}:
        for folder in folder_paths.get_folder_paths(kind):
            path = Path(folder) / name
            if path.is_file():
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
    beside = sorted(uvit.parent.glob("caption_decoder*"))
    if beside:
        return beside[0]
    for kind in (_TEXT, _MODELS):
        for name in folder_paths.get_filename_list(kind):
            if Path(name).name.startswith("caption_decoder"):
                return Path(folder_paths.get_full_path_or_raise(kind, name))
    searched = [*folder_paths.get_folder_paths(_TEXT), *folder_paths.get_folder_paths(_MODELS)]
    folders = ", ".join(dict.fromkeys([str(uvit.parent), *searched]))
    stray = find_stray("caption_decoder.pth", (_TEXT, _MODELS))
    raise FileNotFoundError(
        f"{_NAME}: caption_decoder.pth was not found; looked in {folders}. UniDiffuser needs its encode_prefix to read "
        "text. "
        + (f"It lies in {stray.parent}: move" if stray else "It is released beside uvit_v1.pth: put")
        + f" it in {searched[0]} or beside {uvit.name}."
    )


def _carries_prefix(uvit: Path) -> bool:
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
        return make_schema(
            node_id="FeedFaceLoadUniDiffuser",
            display_name=_NAME,
            search_aliases=["unidiffuser", "uvit", "u-vit", "released feedface"],
            description=(
                "Loads UniDiffuser v1, the model of the released FeedFace adapter. Text and pictures go through the "
                "CLIP and VAE of any Stable Diffusion 1.x checkpoint."
            ),
            inputs=[
                io.Combo.Input(
                    "uvit",
                    options=choices(folder_paths.get_filename_list(_MODELS), _MODELS),
                    tooltip="uvit_v1.pth or its conversion, in models/diffusion_models.",
                ),
                io.Combo.Input(
                    "caption_decoder",
                    options=[_AUTO, *decoder_files()],
                    default=_AUTO,
                    tooltip="caption_decoder.pth or its conversion, in models/text_encoders or beside the "
                    "U-ViT. auto finds it by name.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(_DTYPES),
                    default="default",
                    optional=True,
                    tooltip="Type of the weights; default is ComfyUI's choice for the device.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For samplers, guiders and FeedFace Apply Adapter.")
            ],
        )

    @classmethod
    def validate_inputs(cls, uvit: str, caption_decoder: str = _AUTO) -> bool | str:
        """Before the graph runs: a missing or misplaced file, with the folders in the message."""
        try:
            path = find_file(uvit, (_MODELS,), "UniDiffuser's U-ViT, uvit_v1.pth")
            find_prefix(path, caption_decoder)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, uvit: str, caption_decoder: str = _AUTO, weight_dtype: str = "default") -> io.NodeOutput:
        path = find_file(uvit, (_MODELS,), "UniDiffuser's U-ViT, uvit_v1.pth")
        model = unidiffuser_model.load_unidiffuser(path, find_prefix(path, caption_decoder), _DTYPES[weight_dtype])
        return io.NodeOutput(model)

    @classmethod
    def fingerprint_inputs(cls, uvit: str, caption_decoder: str = _AUTO, weight_dtype: str = "default"):
        """A file that was replaced is read again: the U-ViT, or the caption decoder."""
        decoders = decoder_files() if caption_decoder == _AUTO else [caption_decoder]
        return folders.state(_MODELS, [uvit, *decoders]), folders.state(_TEXT, decoders), weight_dtype


class UnconditionalText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="FeedFaceUniDiffuserUnconditional",
            display_name="FeedFace Unconditional Text",
            search_aliases=["true unconditional", "unidiffuser negative", "no text"],
            description=(
                "The negative prompt that UniDiffuser was made for: text of pure noise at the text's last timestep, so "
                "the model knows that there is no text. An empty prompt works as well and leans on the captions it saw."
            ),
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of the noise that stands for the text.",
                )
            ],
            outputs=[io.Conditioning.Output(display_name="negative", tooltip="For the negative input of a sampler.")],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        # The states are never read: extra_conds draws the noise after the linear they would go through.
        return io.NodeOutput([[torch.zeros(1, 77, 768), {unidiffuser_model.UNCONDITIONAL_KEY: seed}]])


NODES: list[type[io.ComfyNode]] = [LoadUniDiffuser, UnconditionalText]
