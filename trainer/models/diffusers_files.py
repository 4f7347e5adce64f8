"""Reading the parts of a Stable Diffusion from a diffusers folder or a single-file checkpoint, offline.

diffusers converts the weights of a single file, but takes the configurations from the Hugging Face hub. Here
they are read off the shapes of the weights, so that a checkpoint is all it needs; only the vocabulary of the
tokenizer has to come from somewhere (``model.tokenizer``).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .frozen_model import DTYPES, BaseError, Part
from .single_file import OPEN_CLIP, CheckpointConfigs, read_checkpoint, read_configs

if TYPE_CHECKING:
    from trainer.config import ModelSettings

VOCABULARY_HINT = (
    "Give a folder with CLIP's vocab.json and merges.txt as model.tokenizer (ComfyUI has one: "
    "comfy/sd1_tokenizer), or a diffusers folder as model.config"
)


@dataclass
class Components:
    """The loaded parts; None or empty where they were not asked for."""

    scheduler: dict
    unet: nn.Module | None = None
    autoencoder: nn.Module | None = None
    text_encoders: list[nn.Module] = field(default_factory=list)
    tokenizers: list[Any] = field(default_factory=list)
    autoencoder_config: dict | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars for each part, and diffusers' warning about a cast that it makes itself."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    level, bars = diffusers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@quiet()
def load_folder(settings: ModelSettings, parts: Sequence[Part]) -> Components:
    """Load a diffusers folder.

    Raises:
        BaseError: naming the subfolder that is missing or does not load.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    path = settings.base if settings.allow_hub else str(Path(settings.base).expanduser())
    local = Path(path).is_dir()
    if local and not (Path(path) / "unet").is_dir():
        found = sorted(entry.name for entry in Path(path).iterdir())
        raise BaseError(
            f"model.base: {path} is no diffusers folder of a Stable Diffusion: expected a subfolder unet, "
            f"found {', '.join(found[:8]) or 'nothing'}"
        )

    def load(kind: Any, subfolder: str, **options) -> Any:
        if local and not (Path(path) / subfolder).is_dir():
            raise BaseError(f"model.base: {path} has no subfolder {subfolder}, which is needed here")
        if issubclass(kind, nn.Module):
            options["torch_dtype"] = DTYPES[settings.precision] if subfolder == "unet" else torch.float32
            options["variant"] = _variant(Path(path) / subfolder) if local else None
        try:
            return kind.from_pretrained(path, subfolder=subfolder, local_files_only=not settings.allow_hub, **options)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise BaseError(f"model.base: cannot load {subfolder} of {path}: {error}") from error

    from diffusers import DDPMScheduler

    try:
        scheduler = DDPMScheduler.load_config(path, subfolder="scheduler", local_files_only=not settings.allow_hub)
        autoencoder = AutoencoderKL.load_config(path, subfolder="vae", local_files_only=not settings.allow_hub)
    except OSError as error:
        raise BaseError(f"model.base: {path} is incomplete: {error}") from error
    components = Components(dict(scheduler), autoencoder_config=dict(autoencoder))
    if "host" in parts:
        components.unet = load(UNet2DConditionModel, "unet")
    if "autoencoder" in parts:
        components.autoencoder = load(AutoencoderKL, "vae")
    if "text" in parts:
        two = (Path(path) / "text_encoder_2").is_dir() if local else settings.family == "sdxl"
        components.text_encoders = [load(CLIPTextModel, "text_encoder")]
        components.tokenizers = [load(CLIPTokenizer, "tokenizer")]
        if two:
            components.text_encoders.append(load(CLIPTextModelWithProjection, "text_encoder_2"))
            components.tokenizers.append(load(CLIPTokenizer, "tokenizer_2"))
    return components


def _variant(folder: Path) -> str | None:
    """``fp16`` for a folder that holds only weights of that variant."""
    names = [entry.name for entry in folder.iterdir() if entry.suffix in (".safetensors", ".bin")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


@quiet()
def load_single_file(settings: ModelSettings, parts: Sequence[Part]) -> Components:
    """Load a single-file checkpoint, without network.

    Raises:
        BaseError: for a file that is no Stable Diffusion, lacks a part, or leaves a question open (what a
            Stable Diffusion 2 predicts, where the vocabulary is).
    """
    path = Path(settings.base).expanduser()
    weights, metadata = read_checkpoint(path)
    configs = read_configs(weights, metadata, str(path))
    if configs.prediction is None and settings.prediction == "auto" and settings.config is None:
        raise BaseError(
            f"model.base: {path} does not say what it predicts (Stable Diffusion 2 comes in both kinds). Set "
            "model.prediction to v for the 768-pixel models or to epsilon for the 512-pixel base models"
        )
    with _config_folder(configs, settings) as folder:
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        autoencoder = json.loads((folder / "vae" / "config.json").read_text())
        components = Components(scheduler, autoencoder_config=autoencoder)
        _convert(components, weights, folder, settings, parts, len(configs.text_encoders))
    return components


def _convert(
    components: Components,
    weights: dict[str, Tensor],
    folder: Path,
    settings: ModelSettings,
    parts: Sequence[Part],
    encoders: int,
) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import SingleFileComponentError, create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    options = {"config": str(folder), "local_files_only": True}
    try:
        if "host" in parts:
            dtype = DTYPES[settings.precision]
            components.unet = UNet2DConditionModel.from_single_file(
                dict(weights), subfolder="unet", torch_dtype=dtype, **options
            )
        if "autoencoder" in parts:
            components.autoencoder = AutoencoderKL.from_single_file(
                dict(weights), subfolder="vae", torch_dtype=torch.float32, **options
            )
        if "text" in parts:
            names = ["text_encoder", "text_encoder_2"][:encoders]
            kinds = [CLIPTextModel, CLIPTextModelWithProjection]
            components.text_encoders = [
                create_diffusers_clip_model_from_ldm(
                    kind, dict(weights), subfolder=name, torch_dtype=torch.float32, **options
                )
                for kind, name in zip(kinds, names, strict=False)
            ]
            components.tokenizers = _tokenizers(
                settings, encoders, openclip_first=any(name.startswith(OPEN_CLIP) for name in weights)
            )
    except (SingleFileComponentError, ValueError, RuntimeError, KeyError, OSError) as error:
        if isinstance(error, BaseError):
            raise
        raise BaseError(f"model.base: cannot convert {settings.base}: {error}") from error
    for part in (components.unet, components.autoencoder, *components.text_encoders):
        missing = [] if part is None else [name for name, value in part.named_parameters() if value.is_meta]
        if missing:
            raise BaseError(
                f"model.base: {settings.base} lacks {len(missing)} weights of its "
                f"{type(part).__name__}: {', '.join(missing[:3])}"
            )


@contextmanager
def _config_folder(configs: CheckpointConfigs, settings: ModelSettings) -> Iterator[Path]:
    """A folder of diffusers configurations: the one given, or a temporary one made from the weights."""
    if settings.config is not None:
        given = Path(settings.config).expanduser()
        for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
            if not (given / name).is_file():
                raise BaseError(f"model.config: {given} is no diffusers folder: it has no {name}")
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="feedface-configs-") as temporary:
        folder = Path(temporary)
        entries: dict[str, Mapping] = {
            "unet/config.json": configs.unet,
            "vae/config.json": configs.autoencoder,
            "scheduler/scheduler_config.json": configs.scheduler,
        }
        for index, encoder in enumerate(configs.text_encoders):
            entries[f"text_encoder{'_2' if index else ''}/config.json"] = encoder
        for name, values in entries.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(values))
        yield folder


def _tokenizers(settings: ModelSettings, count: int, openclip_first: bool) -> list[Any]:
    """CLIP's tokenizer for each text encoder; the OpenCLIP ones fill up with token 0, OpenAI's with the end
    token.
    """
    from transformers import CLIPTokenizer

    given = settings.tokenizer or settings.config
    if given is None:
        raise BaseError(
            f"model.base: {settings.base} is a single file, and such files carry no vocabulary for the "
            f"tokenizer. {VOCABULARY_HINT}"
        )
    folder = Path(given).expanduser()
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise BaseError(f"model.tokenizer: {folder} has no vocab.json. {VOCABULARY_HINT}")
    tokenizers = []
    for index in range(count):
        fill_with_zero = index == 1 or openclip_first
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0) if fill_with_zero else tokenizer.eos_token
        tokenizers.append(tokenizer)
    return tokenizers
