"""Where the small model lives, and how it is written and read.

``models/feedface_small`` is an ordinary diffusers folder of a Stable Diffusion (``unet``, ``vae``, ``text_encoder``,
``tokenizer``, ``scheduler``) in half precision, with three more: ``adapter`` (the trained FeedFace adapter with its
face encoder; the node FeedFace Load Adapter lists it), ``examiner`` (for judging only) and ``people`` (references of
held-out people, for the demo, and the settings that they were drawn with).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModel

from feedface_core.files.adapter_file import load_adapter
from feedface_core.files.atomic import write_safetensors
from feedface_core.modules.encoder import build_encoder
from trainer.errors import TrainerError

from . import denoiser, text
from .examiner import Examiner, EyeReader, MaskReader
from .settings import PeopleSettings

FOLDER = Path(__file__).parents[2] / "models" / "feedface_small"
PEOPLE = "people/settings.json"
ADAPTER = "adapter/feedface_small.safetensors"  # a folder of its own, which FeedFace Load Adapter lists


def adapter_file(kind: str) -> str:
    """The file of an adapter of another kind, beside :data:`ADAPTER`."""
    return ADAPTER.replace(".safetensors", f"_{kind}.safetensors")


PUBLISHED = {"full": ADAPTER, "face0": adapter_file("face0"), "mixer-text": adapter_file("mixer")}
PUBLISHED |= {"several": adapter_file("several")}
"""The published adapters by the variant that they are, see :mod:`~.variants`."""


def picture_size(folder: Path = FOLDER) -> int:
    """Side of the model's pictures in pixels. Raises ``TrainerError`` where there is no model."""
    path = folder / "vae" / "config.json"
    if not path.is_file():
        raise TrainerError(f"no small model in {folder}: `python -m examples.small_model.build` makes it")
    return json.loads(path.read_text())["sample_size"]


def people_settings(folder: Path = FOLDER) -> PeopleSettings:
    """How the people are drawn that the model was trained on. Raises ``TrainerError`` where there is no model."""
    path = folder / PEOPLE
    if not path.is_file():
        raise TrainerError(f"no {path}: `python -m examples.small_model.build` makes it")
    return PeopleSettings.model_validate_json(path.read_text())


def adapter_name(variant: str, training: int) -> str:
    """Name of an adapter's folder and files in the build."""
    return f"{variant}-seed{training}" if training else variant


def half(module: nn.Module) -> nn.Module:
    """The module in half precision. Raises ``TrainerError``, which names a weight that is not finite there."""
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight.half()).all():
            raise TrainerError(f"{type(module).__name__}: {name} is not finite in half precision")
    return module.half()


def save_pipeline(
    folder: Path,
    autoencoder: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    people: PeopleSettings,
) -> None:
    """Writes the frozen text-to-image model as a diffusers folder, with the settings of its people."""
    (folder / PEOPLE).parent.mkdir(parents=True, exist_ok=True)
    (folder / PEOPLE).write_text(people.model_dump_json(indent=1) + "\n")
    half(autoencoder).save_pretrained(folder / "vae")
    _forget_origin(folder / "vae" / "config.json")
    save_text_to_image(folder, unet, text_encoder)
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


def _forget_origin(config: Path) -> None:
    """Leaves out where a model was loaded from: nobody's folders go into a published file."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def save_text_to_image(folder: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
    """Writes the two that are trained together."""
    half(unet).save_pretrained(folder / "unet")
    half(text_encoder).save_pretrained(folder / "text_encoder")


def load_text_to_image(folder: Path) -> denoiser.TextToImage:
    """Reads what :func:`save_text_to_image` wrote, in single precision."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    tokenizer = text.write_tokenizer(folder / "tokenizer")
    model = denoiser.TextToImage(tokenizer, picture_size(folder), unet.config.block_out_channels)
    model.unet.load_state_dict(unet.state_dict())
    written = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
    model.text_encoder.load_state_dict(written.state_dict())
    return model


def encoder_of(file: Path) -> CLIPVisionModel:
    """The face encoder that an adapter carries. Raises ``FeedFaceError`` where it carries none."""
    found = load_adapter(file)
    return build_encoder(found.config.encoder, found.encoder_tensors)


def save_encoder(folder: Path, encoder: CLIPVisionModel) -> None:
    """Writes the face encoder, and how its pixels are prepared."""
    half(encoder).save_pretrained(folder / "face_encoder")
    size = encoder.config.image_size
    prepared = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": size, "width": size}}
    (folder / "face_encoder" / "preprocessor_config.json").write_text(json.dumps(prepared, indent=1) + "\n")


def save_examiner(folder: Path, examiner: Examiner, masks: MaskReader, eyes: EyeReader) -> None:
    """Writes the networks that judge."""
    for name, module in (("identity", examiner), ("masks", masks), ("eyes", eyes)):
        metadata = {"features": json.dumps(module.values)} if isinstance(module, Examiner) else {}
        write_safetensors(folder / "examiner" / f"{name}.safetensors", half(module).state_dict(), metadata)


class Judges(NamedTuple):
    """The networks that judge, in single precision. Models published before the eye reader have none, and an examiner
    that reads no features."""

    examiner: Examiner
    masks: MaskReader
    eyes: EyeReader | None


def load_examiner(folder: Path = FOLDER) -> Judges:
    """Reads the networks that judge. Raises ``TrainerError`` where they are missing."""
    paths = {name: folder / "examiner" / f"{name}.safetensors" for name in ("identity", "masks", "eyes")}
    for name, path in paths.items():
        if name != "eyes" and not path.is_file():
            raise TrainerError(f"no {path}: `python -m examples.small_model.build recogniser` trains it")
    size = picture_size(folder)
    with safe_open(paths["identity"], "pt") as file:
        values = json.loads((file.metadata() or {}).get("features", "{}"))
    eyes = EyeReader(size) if paths["eyes"].is_file() else None
    judges = Judges(Examiner(values, size), MaskReader(size), eyes)
    for path, module in zip(paths.values(), judges, strict=True):
        if module is not None:
            module.load_state_dict(load_file(path))
            module.eval().requires_grad_(False)
    return judges
