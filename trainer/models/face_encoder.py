"""The frozen face encoder on the training side: a CLIP vision transformer from a local folder, in float32."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import CLIPVisionModel
from typing_extensions import Self

from feedface_core.config import EncoderConfig, VisionFields
from feedface_core.errors import FeedFaceError, located, shorten, typed
from feedface_core.faces.crop import CROP_SCALE
from feedface_core.faces.recognisers import Recogniser, load_recogniser, vectors_of_crops
from feedface_core.files.json_file import read_json
from feedface_core.modules import encoder as core

from ..config import EncoderSettings
from ..errors import TrainerError
from .diffusers_files import load_clip_vision
from .frozen_model import freeze
from .precision import full_precision

logger = logging.getLogger(__name__)

#: Of a recogniser's vector.
RECOGNISER_WIDTHS = {"insightface": 512, "dlib": 128}
#: What an adapter file says of the encoder's architecture.
SIZES = ("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads")
FIELDS = (*SIZES, "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps")


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


def recogniser_config(name: str, size: int) -> EncoderConfig:
    """What an adapter file says of a recogniser by its name."""
    width = {"hidden_size": RECOGNISER_WIDTHS[name.partition("/")[0]], "num_attention_heads": 1}
    described = {"type": "recogniser", "name": name, "included": False, "fingerprint": name[:64]}
    return EncoderConfig(config=width, image_size=size, **described)


class RecogniserEncoder(FaceEncoder):
    """A face recogniser's vector as the one token of a face (Face0); it does not go into the adapter file.

    Args:
        recogniser: which one.
        size: side of the crops in pixels.
        scale: side of a crop over the longer side of its face's box.
    """

    def __init__(self, recogniser: Recogniser, size: int, scale: float = CROP_SCALE) -> None:
        self.recogniser, self.module, self.scale = recogniser, nn.Module(), scale
        self.config = recogniser_config(recogniser.name, size)

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu")

    def encode(self, crops: Tensor) -> Tensor:
        """Face crops ``(N, H, W, 3)`` in 0…1 → vectors ``(N, 1, D)``; zeros for a crop in which it finds no face."""
        vectors = vectors_of_crops(self.recogniser, crops.cpu().float(), self.scale)
        if missing := sum(vector is None for vector in vectors):
            logger.warning(
                "%s finds no face in %d of %d crops: they say nothing", self.config.name, missing, len(crops)
            )
        nothing = torch.zeros(self.config.width)
        return torch.stack([nothing if vector is None else vector for vector in vectors])[:, None].to(crops.device)

    def null_hidden(self) -> Tensor:
        """Zeros ``(1, 1, D)``."""
        return torch.zeros(1, 1, self.config.width)


def check_config(found: Mapping[str, Any]) -> None:
    """Raises :class:`FeedFaceError` for the ``config.json`` of another model than CLIP, or sizes that none has."""
    if found.get("model_type") not in ("clip", "clip_vision_model"):
        raise FeedFaceError(f"is a model of type {shorten(found.get('model_type'))}, expected a CLIP vision model")
    fields = found.get("vision_config", {}) if found["model_type"] == "clip" else found
    fields = typed(TypeAdapter(dict[str, Any]), fields)
    typed(TypeAdapter(VisionFields), {name: fields[name] for name in FIELDS if name in fields})


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
    if settings.recogniser is not None:
        roots = [Path.home() / ".insightface"]
        try:
            return RecogniserEncoder(load_recogniser(settings.recogniser, insightface_roots=roots), settings.image_size)
        except FeedFaceError as error:
            raise TrainerError(f"adapter.encoder.recogniser: {error}") from error
    path, where = Path(settings.path).expanduser(), f"adapter.encoder.path: {settings.path}"
    config_file = path / "config.json"
    if not allow_hub and not config_file.is_file():
        raise TrainerError(
            f"{where} has no config.json (looked in {path.absolute()}). Give a folder with a transformers "
            "CLIPVisionModel or CLIPModel, such as a copy of openai/clip-vit-base-patch32"
        )
    if config_file.is_file():
        with located(where):
            check_config(read_json(config_file, dict[str, Any]))
    name = str(path) if path.exists() else settings.path
    module = load_clip_vision(CLIPVisionModel, name, "adapter.encoder.path", allow_hub)
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
        name=settings.name or path.name,
        **settings.model_dump(include={"image_size", "image_mean", "image_std", "layer", "included", "pooling"}),
    )
    return FaceEncoder(module, config).to(device)
