"""A run's models without their weights: as large, and nothing in them. For estimates before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from feedface_core.config import EncoderConfig
from feedface_core.modules.adapter import FaceAdapter
from feedface_core.modules.uvit import UViT
from feedface_core.modules.uvit_config import UViTConfig
from feedface_core.state_dict import read_state_dict

from ..config import Config, EncoderSettings, ModelSettings
from ..config.fields import as_path
from ..data.manifest import DEFAULT_RULE
from ..errors import TrainerError
from .adapter import Models, adapter_config
from .diffusers_files import Components, quiet
from .face_encoder import FIELDS, recogniser_config
from .frozen_model import FrozenModel, Text
from .precision import DTYPES
from .single_file import read_configs
from .stable_diffusion import StableDiffusion, make_scheduler
from .unet import train_unet
from .unidiffuser import UniDiffuser
from .unidiffuser_files import is_unidiffuser, load_uvit


def _unet(context: int, widths: tuple[int, ...], attention: tuple[bool, ...], heads: Any, **more: Any) -> dict:
    return {
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attention)],
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        **more,
    }


#: The published U-Nets, for a base that is not on this machine.
PUBLISHED = {
    "sd1": _unet(768, (320, 640, 1280, 1280), (True, True, True, False), 8),
    "sd2": _unet(1024, (320, 640, 1280, 1280), (True, True, True, False), [5, 10, 20, 20], use_linear_projection=True),
    "sdxl": _unet(
        2048,
        (320, 640, 1280),
        (False, True, True),
        [5, 10, 20],
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2, 10],
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}


class Outline:
    """The models of a run, made on the meta device.

    Args:
        config: of the run; files that it names need not be there, if ``model.family`` says what the base is.

    Attributes:
        assumed: what was taken from the published models, in words.

    Raises:
        TrainerError: nothing says what the base is, or its file is no model.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.assumed = config, []
        self._host = self._find_host(config.model)
        self._encoder = self._find_encoder(config.adapter.encoder)

    def _find_host(self, settings: ModelSettings) -> UViTConfig | dict[str, Any]:
        path = as_path(settings.base, "model.base")
        if is_unidiffuser(path) or settings.family == "unidiffuser":
            if path.is_file():
                return load_uvit(path)[0].config
            self.assumed.append(f"{path} is not there: the published U-ViT")
            return UViTConfig()
        if path.is_file():
            return _configs_of_file(path)["unet"]
        for folder in (path, *([as_path(settings.config, "model.config")] if settings.config else [])):
            if (folder / "unet" / "config.json").is_file():
                return UNet2DConditionModel.load_config(str(folder), subfolder="unet")
        if settings.family not in PUBLISHED:
            raise TrainerError(
                f"model.base: {path} is not there, so its size is not known. Give its file or folder, or set "
                f"model.family to one of {', '.join(PUBLISHED)}, unidiffuser to take the published size"
            )
        self.assumed.append(f"{path} is not there: the published U-Net of {settings.family}")
        return PUBLISHED[settings.family]

    def _find_encoder(self, settings: EncoderSettings) -> EncoderConfig:
        if settings.recogniser is not None:
            return recogniser_config(settings.recogniser, settings.image_size)
        fields, file = {}, as_path(settings.path, "adapter.encoder.path") / "config.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            found = found.get("vision_config", found)
            fields = {name: found[name] for name in FIELDS if name in found}
        else:
            self.assumed.append(f"{settings.path} is not there: CLIP ViT-B/32")
        included = {"image_size", "image_mean", "image_std", "layer", "included", "pooling"}
        return EncoderConfig(config=fields, **settings.model_dump(include=included))

    def make(self) -> Models:
        """Frozen model and adapter, attached; ``encoder`` has a configuration alone, ``recogniser`` is None."""
        frozen = self._frozen()
        described = adapter_config(self.config, frozen, _Described(self._encoder), DEFAULT_RULE)
        with torch.device("meta"):
            adapter = FaceAdapter(described, dtype=torch.float32)
            unet = train_unet(self.config, frozen)
        frozen.attach(adapter)
        return Models(frozen, _Described(self._encoder), adapter, unet=unet)

    def _frozen(self) -> FrozenModel:
        settings = self.config.model
        dtype = DTYPES[settings.precision]
        quiet()
        with torch.device("meta"):
            uvit = isinstance(self._host, UViTConfig)
            host = UViT(self._host) if uvit else UNet2DConditionModel.from_config(self._host)
        if uvit:
            return UniDiffuser({"host": host}, None, self._host, dtype=dtype)
        schedule = {"prediction_type": "v_prediction" if settings.prediction == "v" else "epsilon"}
        scheduler = make_scheduler(schedule, settings)
        return StableDiffusion(Components(schedule, {}, {"host": host}), scheduler, settings.base, dtype)

    def text(self, count: int) -> Text:
        """Text states for ``count`` captions."""
        if isinstance(self._host, UViTConfig):
            return {"states": torch.zeros(count, self._host.text_tokens, self._host.text_width)}
        states = {"states": torch.zeros(count, 77, self._host["cross_attention_dim"])}
        if self._host.get("addition_embed_type") == "text_time":
            width = self._host["projection_class_embeddings_input_dim"] - 6 * self._host["addition_time_embed_dim"]
            states["pooled"] = torch.zeros(count, width)
        return states


def materialise(*roots: nn.Module) -> None:
    """Put empty tensors of this moment's kind in the place of those on the meta device."""
    for module in (module for root in roots for module in root.modules()):
        for name, value in module.named_parameters(recurse=False):
            empty = torch.empty(value.shape, dtype=value.dtype)
            module._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, value in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


class _Described:
    """A face encoder of which there is the configuration alone."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config


def _configs_of_file(path: Path) -> dict[str, dict[str, Any]]:
    """diffusers' configurations of a checkpoint; of a safetensors file the header is all that is read."""
    if path.suffix != ".safetensors":
        return read_configs(*read_state_dict(path), str(path))
    weights: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weights[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
            return read_configs(weights, file.metadata() or {}, str(path))
    except (SafetensorError, OSError) as error:
        raise TrainerError(f"model.base: {path}: {error}") from error
