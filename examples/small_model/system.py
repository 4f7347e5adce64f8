"""Where the parts of the small system live, and how they are written and read.

``models/feedface_small`` is an ordinary diffusers folder of a Stable Diffusion (``unet``, ``vae``, ``text_encoder``,
``tokenizer``, ``scheduler``) in half precision, with three more: ``adapter`` (the trained FeedFace adapter with its
face encoder; the node FeedFace Load Adapter lists it), ``examiner`` (for judging only) and ``people`` (references of
held-out people, for the demo).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModel

from . import denoiser, text
from .identity import CROP, Examiner, MaskReader

FOLDER = Path(__file__).parents[2] / "models" / "feedface_small"
ADAPTER = "adapter/feedface_small.safetensors"  # a folder of its own, which FeedFace Load Adapter lists


def half(module: nn.Module) -> nn.Module:
    """The module in half precision, refusing weights that overflow there.

    Raises:
        ValueError: names the first weight that is not finite in half precision.
    """
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight.half()).all():
            raise ValueError(f"{type(module).__name__}: {name} is not finite in half precision")
    return module.half()


def save_pipeline(
    folder: Path, autoencoder: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> None:
    """Writes the frozen text-to-image system as a diffusers folder."""
    half(autoencoder).save_pretrained(folder / "vae")
    half(unet).save_pretrained(folder / "unet")
    half(text_encoder).save_pretrained(folder / "text_encoder")
    text.write_tokenizer(folder / "tokenizer")  # in the form that every version of transformers reads
    denoiser.scheduler().save_pretrained(folder / "scheduler")
    names = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", **names, "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def save_encoder(folder: Path, encoder: CLIPVisionModel) -> None:
    """Writes the face encoder, and how its pixels are prepared."""
    half(encoder).save_pretrained(folder / "face_encoder")
    prepared = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": CROP, "width": CROP}}
    (folder / "face_encoder" / "preprocessor_config.json").write_text(json.dumps(prepared, indent=1) + "\n")


def save_examiner(folder: Path, examiner: Examiner, masks: MaskReader) -> None:
    """Writes the networks that judge."""
    (folder / "examiner").mkdir(parents=True, exist_ok=True)
    for name, module in (("identity", examiner), ("masks", masks)):
        tensors = {k: v.half().contiguous() for k, v in module.state_dict().items()}
        save_file(tensors, folder / "examiner" / f"{name}.safetensors")


def load_examiner(folder: Path = FOLDER) -> tuple[Examiner, MaskReader]:
    """Reads the networks that judge, in single precision.

    Raises:
        FileNotFoundError: they have not been trained or fetched.
    """
    loaded = []
    for name, module in (("identity", Examiner()), ("masks", MaskReader())):
        path = folder / "examiner" / f"{name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; `python -m examples.small_model.build recogniser` trains it")
        module.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        loaded.append(module.eval().requires_grad_(False))
    return loaded[0], loaded[1]
