"""The frozen face encoder on the training side: a CLIP vision transformer from a local folder, in float32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import Self

from feedface_core.config import EncoderConfig
from feedface_core.modules import encoder as core

from ..errors import TrainerError
from .frozen_model import freeze, full_precision

if TYPE_CHECKING:
    from ..config import EncoderSettings

FIELDS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


class FaceEncoder:
    """Face crops → hidden states, frozen, in float32.

    Args:
        module: a transformers ``CLIPVisionModel``.
        config: what goes into the adapter file.
    """

    def __init__(self, module: nn.Module, config: EncoderConfig) -> None:
        self.module = freeze(module, torch.float32)
        self.config = replace(config, fingerprint=core.fingerprint(config, self.tensors()))

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def encode(self, crops: Tensor) -> Tensor:
        """Face crops ``(N, H, W, 3)`` in 0…1 → hidden states ``(N, T, E)``."""
        with full_precision(self._device):
            return core.encode(self.module, self.config, crops)

    def null_hidden(self) -> Tensor:
        """Hidden states ``(1, T, E)`` of a crop that is zero after normalisation, the published dropped face."""
        size = self.config.image_size
        with full_precision(self._device):
            return core.encode_pixels(self.module, self.config, torch.zeros(1, 3, size, size))

    def release(self) -> None:
        """Free its memory, once everything is cached."""
        self.module = self.module.to("meta")

    def tensors(self) -> dict[str, Tensor]:
        """The weights by their plain Hugging Face names."""
        return {core.plain_name(name): tensor for name, tensor in self.module.state_dict().items()}

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder."""
        self.module.to(device)
        return self


def load_face_encoder(
    settings: EncoderSettings, device: torch.device | str = "cpu", allow_hub: bool = False
) -> FaceEncoder:
    """Load the encoder that the settings name.

    Args:
        settings: ``adapter.encoder`` of the configuration.
        allow_hub: whether a name on the Hugging Face hub may be downloaded.

    Raises:
        TrainerError: a folder that is missing, holds no CLIP vision model, or one of another image size.
    """
    from transformers import CLIPVisionModel

    from .diffusers_files import quiet

    path, where = Path(settings.path).expanduser(), f"adapter.encoder.path: {settings.path}"
    config_file = path / "config.json"
    if not allow_hub and not config_file.is_file():
        raise TrainerError(
            f"{where} has no config.json (looked in {path.absolute()}). Give a folder with a transformers "
            "CLIPVisionModel or CLIPModel, such as a copy of openai/clip-vit-base-patch32"
        )
    found = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {"model_type": "clip"}
    if found.get("model_type") not in ("clip", "clip_vision_model"):
        raise TrainerError(f"{where} is a model of type {found.get('model_type')}, expected a CLIP vision model")
    try:
        with quiet():
            module, info = CLIPVisionModel.from_pretrained(
                str(path) if path.exists() else settings.path, local_files_only=not allow_hub, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TrainerError(f"adapter.encoder.path: cannot load {settings.path}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise TrainerError(
            f"{where} holds no CLIP vision model: {len(missing)} weights are missing ({', '.join(missing[:3])})"
        )
    size, layers = module.config.image_size, module.config.num_hidden_layers
    if size != settings.image_size:
        raise TrainerError(
            f"adapter.encoder.image_size is {settings.image_size}, but {settings.path} was made for {size}"
        )
    if not -layers - 1 <= settings.layer <= layers:
        raise TrainerError(
            f"adapter.encoder.layer is {settings.layer}, but {settings.path} has {layers} layers: {-layers - 1} to "
            f"{layers}"
        )
    config = EncoderConfig(
        config={name: getattr(module.config, name) for name in FIELDS},
        image_size=settings.image_size,
        image_mean=settings.image_mean,
        image_std=settings.image_std,
        layer=settings.layer,
        name=settings.name or path.name,
        included=settings.included,
    )
    return FaceEncoder(module, config).to(device)
