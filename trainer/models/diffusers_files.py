"""Reading the components of a Stable Diffusion from a diffusers folder or a single-file checkpoint, offline.

diffusers converts the weights of a single file, but takes the configurations from the Hugging Face hub. Here they are
read off the shapes of the weights, so that a checkpoint is all it needs; only the vocabulary of the tokenizer has to
come from somewhere (``model.tokenizer``).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError, create_diffusers_clip_model_from_ldm
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from feedface_core.errors import FeedFaceError, shorten
from feedface_core.state_dict import read_state_dict

from ..config import ModelSettings
from ..errors import TrainerError
from .frozen_model import Component
from .precision import DTYPES
from .single_file import OPEN_CLIP, read_configs

#: Class and subfolder of each module.
MODULES = {
    "host": (UNet2DConditionModel, "unet"),
    "autoencoder": (AutoencoderKL, "vae"),
    "text.0": (CLIPTextModel, "text_encoder"),
    "text.1": (CLIPTextModelWithProjection, "text_encoder_2"),
}
VOCABULARY_HINT = (
    "Give a folder with CLIP's vocab.json and merges.txt as model.tokenizer (ComfyUI has one: "
    "comfy/sd1_tokenizer), or a diffusers folder as model.config"
)
LOAD_ERRORS = (SingleFileComponentError, OSError, ValueError, RuntimeError, KeyError)


@dataclass
class Components:
    """What was loaded, and the configurations of scheduler and autoencoder, which are always read.

    Args:
        modules: by key of :data:`MODULES`.
        tokenizers: one for each text encoder.
    """

    scheduler: dict[str, Any]
    autoencoder: dict[str, Any]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    tokenizers: list[Any] = field(default_factory=list)


def quiet() -> None:
    """No progress bar for each module from now on, and no warning of diffusers' about a cast that it makes itself."""
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_clip_vision(cls: type[nn.Module], path: str, setting: str, allow_hub: bool) -> nn.Module:
    """A CLIP vision model of transformers, from a folder or the hub. Raises ``TrainerError`` that names the setting."""
    quiet()
    try:
        module, info = cls.from_pretrained(path, local_files_only=not allow_hub, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and torch raise many types for what is broken
        raise TrainerError(f"{setting}: cannot load {path}: {shorten(error)}") from error
    if missing := sorted(info["missing_keys"]):
        listed = ", ".join(missing[:3])
        raise TrainerError(f"{setting}: {path} is no {cls.__name__}: {len(missing)} weights are missing ({listed})")
    return module


def _wanted(components: Sequence[Component], encoders: int, settings: ModelSettings) -> dict[str, tuple]:
    """Class, subfolder and number format of each module to load."""
    return {
        key: (*found, DTYPES[settings.precision] if key == "host" else torch.float32)
        for key, found in MODULES.items()
        if key.split(".")[0] in components and (key != "text.1" or encoders == 2)
    }


def load_folder(settings: ModelSettings, components: Sequence[Component]) -> Components:
    """Load a diffusers folder, or with ``model.allow_hub`` a model of the Hugging Face hub.

    Raises:
        TrainerError: naming the subfolder that is missing or does not load.
    """
    quiet()
    path = settings.base if settings.allow_hub else str(Path(settings.base).expanduser())
    folder = Path(path)
    local, options = folder.is_dir(), {"local_files_only": not settings.allow_hub}
    if local and not (folder / "unet").is_dir():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise TrainerError(
            f"model.base: {path} is no diffusers folder of a Stable Diffusion: expected a subfolder unet, found {found}"
        )

    def load(loader: Any, subfolder: str, **more: Any) -> Any:
        if local and not (folder / subfolder).is_dir():
            raise TrainerError(f"model.base: {path} has no subfolder {subfolder}, which is needed here")
        try:
            return loader(path, subfolder=subfolder, **options, **more)
        except LOAD_ERRORS as error:
            raise TrainerError(f"model.base: cannot load {subfolder} of {path}: {error}") from error

    result = Components(load(DDPMScheduler.load_config, "scheduler"), load(AutoencoderKL.load_config, "vae"))
    encoders = 1 + ((folder / "text_encoder_2").is_dir() if local else settings.family == "sdxl")
    for key, (cls, subfolder, dtype) in _wanted(components, encoders, settings).items():
        variant = _variant(folder / subfolder) if local else None
        result.modules[key] = load(cls.from_pretrained, subfolder, torch_dtype=dtype, variant=variant)
    if "text" in components:
        subfolders = ("tokenizer", "tokenizer_2")[:encoders]
        result.tokenizers = [load(CLIPTokenizer.from_pretrained, subfolder) for subfolder in subfolders]
    return result


def _variant(folder: Path) -> str | None:
    """``fp16`` for a folder that holds only weights of that variant."""
    names = [entry.name for entry in folder.glob("*") if entry.suffix in (".safetensors", ".bin")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def load_single_file(settings: ModelSettings, components: Sequence[Component]) -> Components:
    """Load a single-file checkpoint, without network.

    Raises:
        TrainerError: for a file that is no Stable Diffusion, lacks weights, or leaves a question open (what a Stable
            Diffusion 2 predicts, where the vocabulary is).
    """
    quiet()
    try:
        weights, metadata = read_state_dict(Path(settings.base).expanduser())
    except (FeedFaceError, OSError) as error:
        raise TrainerError(f"model.base: {error}") from error
    configs = read_configs(weights, metadata, settings.base)
    if configs["scheduler"]["prediction_type"] is None and settings.prediction == "auto" and settings.config is None:
        raise TrainerError(
            f"model.base: {settings.base} does not say what it predicts (Stable Diffusion 2 comes in both kinds). Set "
            "model.prediction to v for the 768-pixel models or to epsilon for the 512-pixel base models"
        )
    encoders = 2 if "text_encoder_2" in configs else 1
    with _config_folder(configs, settings) as folder:
        result = Components(
            json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")),
            json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8")),
        )
        for key, (cls, subfolder, dtype) in _wanted(components, encoders, settings).items():
            options = {"subfolder": subfolder, "torch_dtype": dtype, "config": str(folder), "local_files_only": True}
            try:
                if key.startswith("text"):
                    module = create_diffusers_clip_model_from_ldm(cls, dict(weights), **options)
                else:
                    module = cls.from_single_file(dict(weights), **options)
            except LOAD_ERRORS as error:
                raise TrainerError(f"model.base: cannot convert {settings.base}: {error}") from error
            missing = [name for name, value in module.named_parameters() if value.is_meta]
            if missing:
                raise TrainerError(
                    f"model.base: {settings.base} lacks {len(missing)} weights of its {cls.__name__}: "
                    f"{', '.join(missing[:3])}"
                )
            result.modules[key] = module
    if "text" in components:
        open_clip_first = any(name.startswith(OPEN_CLIP) for name in weights)
        result.tokenizers = [_tokenizer(settings, open_clip_first or index == 1) for index in range(encoders)]
    return result


@contextmanager
def _config_folder(configs: Mapping[str, Mapping[str, Any]], settings: ModelSettings) -> Iterator[Path]:
    """A folder of diffusers configurations: ``model.config``, or a temporary one made from the weights."""
    if settings.config is not None:
        folder = Path(settings.config).expanduser()
        for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
            if not (folder / name).is_file():
                raise TrainerError(f"model.config: {folder} is no diffusers folder: it has no {name}")
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="feedface-configs-") as temporary:
        for subfolder, values in configs.items():
            target = Path(temporary, subfolder)
            target.mkdir()
            name = "scheduler_config.json" if subfolder == "scheduler" else "config.json"
            (target / name).write_text(json.dumps(values), encoding="utf-8")
        yield Path(temporary)


def _tokenizer(settings: ModelSettings, fill_with_zero: bool) -> Any:
    """CLIP's tokenizer; OpenCLIP's fills up with token 0, OpenAI's with the end token."""
    source = settings.tokenizer or settings.config
    if source is None:
        raise TrainerError(
            f"model.base: {settings.base} is a single file, and such files carry no vocabulary for the tokenizer. "
            f"{VOCABULARY_HINT}"
        )
    folder = Path(source).expanduser()
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise TrainerError(f"model.tokenizer: {folder} has no vocab.json. {VOCABULARY_HINT}")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0) if fill_with_zero else tokenizer.eos_token
    return tokenizer
