"""The adapter that is evaluated, with its face encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from feedface_core.faces import DetectedFace, crop_face, load_image
from feedface_core.faces.recognisers import EncoderRecogniser
from feedface_core.faces.select import crop_scale_of
from feedface_core.files.adapter_file import AdapterFile, load_adapter
from feedface_core.modules import encoder as core

from ..config import EncoderSettings, EvaluateSettings
from ..config.fields import as_path
from ..errors import TrainerError
from ..export import export
from ..models.face_encoder import load_face_encoder
from ..models.precision import full_precision
from ..training.checkpoint import MANIFEST
from .looking import Look


class Subject:
    """The adapter that is evaluated, with its face encoder.

    Args:
        settings: ``adapter``, ``encoder`` and ``device`` are read.
        output: a checkpoint is exported to ``adapter.safetensors`` in it.

    Raises:
        FeedFaceError: there is no such adapter, or its encoder is missing or another one.
    """

    def __init__(self, settings: EvaluateSettings, output: Path) -> None:
        path = as_path(settings.adapter, "adapter")
        self.name = path.name
        if path.is_dir() or path.name == MANIFEST:
            path = path.parent if path.name == MANIFEST else path
            target = output / "adapter.safetensors"
            path = export(path, target, precision="fp32", encoder_path=settings.encoder)
        try:
            self.file: AdapterFile = load_adapter(path)
        except OSError as error:
            raise TrainerError(f"adapter {path}: cannot be read: {error}") from error
        self.config, self.device = self.file.config, settings.device
        self.encoder: nn.Module = _encoder_of(self.file, settings.encoder).to(self.device)

    def encode(self, crops: Tensor) -> Tensor:
        """Face crops ``(N, S, S, 3)`` in 0…1 → hidden states ``(N, T, E)``, float32."""
        with full_precision(self.device):
            return core.encode(self.encoder, self.config.encoder, crops.to(self.device)).float()

    def recogniser(self) -> EncoderRecogniser:
        """The encoder as a recogniser."""

        def encode(image: Tensor, faces: Sequence[DetectedFace]) -> Tensor:
            return self.encode(torch.stack([self._crop(image, face) for face in faces]))

        return EncoderRecogniser(encode, self.config.encoder.fingerprint)

    def crops(self, looks: Sequence[Look]) -> Tensor:
        """The faces that were seen in photos as crops ``(N, S, S, 3)``, cut as in training."""
        return torch.stack([self._crop(load_image(look.path), look.face) for look in looks])

    def _crop(self, image: Tensor, face: DetectedFace) -> Tensor:
        own = self.config.encoder
        scale = crop_scale_of(face, own.crop_scale)
        return crop_face(image, face.box, own.image_size, scale, own.crop_fill, own.crop_border)

    @property
    def resolution(self) -> int:
        """Side of pictures in pixels that the adapter's file names, or 512."""
        named = self.file.metadata.get("modelspec.resolution", "").partition("x")[0]
        return int(named) if named.isdecimal() and 64 <= int(named) <= 8192 else 512


def _encoder_of(file: AdapterFile, folder: str | None) -> nn.Module:
    own = file.config.encoder
    if file.encoder_tensors:
        return core.build_encoder(own, file.encoder_tensors, torch.float32)
    if folder is None:
        raise TrainerError(
            f"adapter {file.path}: does not include its face encoder {own.name} ({own.fingerprint}); give its folder "
            "as encoder"
        )
    fields = {name: getattr(own, name) for name in ("layer", "image_size", "image_mean", "image_std", "pooling")}
    loaded = load_face_encoder(EncoderSettings(path=folder, **fields))
    if loaded.config.fingerprint != own.fingerprint:
        raise TrainerError(
            f"encoder {folder}: is not the adapter's: fingerprint {loaded.config.fingerprint}, expected "
            f"{own.fingerprint}"
        )
    return loaded.module
