"""A loaded adapter: its file, and its weights and encoder under ComfyUI's memory management."""

from __future__ import annotations

import hashlib
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..feedface_core.conditioning import Face
from ..feedface_core.config import AdapterConfig
from ..feedface_core.files.adapter_file import AdapterFile, AdapterFileError, describe, load_adapter
from ..feedface_core.modules.branch import scaled_dot_product_attention
from ..feedface_core.modules.encoder import build_encoder, encode, fingerprint, plain_name

_ENCODER_BATCH = 16


class LoadedAdapter:
    """What the socket FEEDFACE_ADAPTER carries. Weights reach a device only when a model or an encode needs them."""

    def __init__(self, path: str, encoder_path: str | None = None):
        """
        Raises:
            FileNotFoundError, AdapterFileError: as :func:`load_adapter`, or when the encoder cannot be found.
        """
        file = load_adapter(path)
        self.path = path
        self.name = Path(path).name
        self.config: AdapterConfig = file.config
        self.description = describe(file)
        self.key = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        self._encoder_tensors = file.encoder_tensors or read_encoder(file, encoder_path)
        self.encoder_fingerprint = file.config.encoder.fingerprint or fingerprint(
            file.config.encoder, self._encoder_tensors
        )
        self._file: AdapterFile | None = file
        self._patchers: dict[torch.dtype, ModelPatcher] = {}
        self._encoder: ModelPatcher | None = None

    def patcher(self, dtype: torch.dtype) -> ModelPatcher:
        """The branches in a floating-point type, made once and moved between devices by ComfyUI."""
        if dtype not in self._patchers:
            file, self._file = self._file or load_adapter(self.path), None
            device = comfy.model_management.get_torch_device()
            # ComfyUI's default on a CPU is made for little memory; torch's own is several times faster there.
            attention = scaled_dot_product_attention if device.type == "cpu" else optimized_attention
            adapter = file.build(dtype=dtype, operations=comfy.ops.manual_cast, attention=attention)
            self._patchers[dtype] = ModelPatcher(
                adapter, load_device=device, offload_device=comfy.model_management.unet_offload_device()
            )
        return self._patchers[dtype]

    @staticmethod
    def dtype_of(patcher: ModelPatcher) -> torch.dtype:
        return patcher.model.projection.weight.dtype

    def encode(self, crops: Tensor) -> Tensor:
        """Face crops ``(N, H, W, 3)``, values 0…1 → hidden states ``(N, T, E)`` in fp32 on the CPU."""
        if self._encoder is None:
            model = build_encoder(self.config.encoder, self._encoder_tensors, dtype=torch.float32)
            self._encoder_tensors = {}
            # ModelPatcher sets an attribute ``device``, which is a read-only property of transformers' models.
            self._encoder = ModelPatcher(
                torch.nn.ModuleDict({"model": model}),
                comfy.model_management.get_torch_device(),
                comfy.model_management.text_encoder_offload_device(),
            )
        comfy.model_management.load_model_gpu(self._encoder)
        progress = comfy.utils.ProgressBar(crops.shape[0])
        states = []
        for batch in crops.split(_ENCODER_BATCH):
            batch = batch.to(self._encoder.load_device)
            states.append(encode(self._encoder.model["model"], self.config.encoder, batch).float().cpu())
            progress.update(batch.shape[0])
        return torch.cat(states)

    def check_face(self, face: Face) -> None:
        """Raises ``ValueError`` for a face from an encoder this adapter was not trained with."""
        width = face.hidden.shape[-1]
        other = face.encoder and face.encoder != self.encoder_fingerprint
        if other or width != self.config.encoder.width:
            raise ValueError(
                f"FeedFace: the face was encoded by encoder {face.encoder or 'unknown'} ({width} wide), but "
                f"{self.name} was trained with {self.encoder_fingerprint} ({self.config.encoder.width} wide, "
                f"{self.config.encoder.name}). Encode the photos again with this adapter (node FeedFace Encode Faces)."
            )


def read_encoder(file: AdapterFile, encoder_path: str | None) -> dict[str, Tensor]:
    """The encoder's weights from ``models/clip_vision``, for an adapter that leaves them out.

    Raises:
        AdapterFileError: names the encoder and every folder searched.
    """
    config = file.config.encoder
    names = folder_paths.get_filename_list("clip_vision")
    wanted = config.name.rsplit("/", 1)[-1].lower()
    if encoder_path is None:
        matches = [name for name in names if wanted in name.lower()]
        if not matches:
            searched = ", ".join(folder_paths.get_folder_paths("clip_vision"))
            raise AdapterFileError(
                f"{file.path} needs the face encoder {config.name}, which is not inside it. Looked for a file with "
                f"{wanted!r} in its name in {searched}; found {', '.join(names) or 'no files'}. Save the encoder's "
                f"model.safetensors there as {wanted}.safetensors, or choose it in the node's face_encoder input."
            )
        encoder_path = folder_paths.get_full_path_or_raise("clip_vision", matches[0])
    tensors = comfy.utils.load_torch_file(encoder_path, safe_load=True)
    vision = {plain_name(name): tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    tensors = vision or tensors
    if "embeddings.class_embedding" not in tensors:
        raise AdapterFileError(
            f"{encoder_path} is not a CLIP vision encoder with Hugging Face names; {file.path} needs {config.name}"
        )
    found = fingerprint(config, tensors)
    if config.fingerprint and found != config.fingerprint:
        raise AdapterFileError(
            f"{encoder_path} is encoder {found}, but {file.path} was trained with {config.fingerprint} ({config.name})"
        )
    return tensors
