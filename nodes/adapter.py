"""A loaded adapter: its file, and its weights and encoder under ComfyUI's memory management."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..feedface_core.conditioning import Face, People
from ..feedface_core.config import AdapterConfig, EncoderConfig
from ..feedface_core.errors import FeedFaceError
from ..feedface_core.faces.recognisers import load_recogniser, vectors_of_crops
from ..feedface_core.files.adapter_file import AdapterFile, load_adapter
from ..feedface_core.modules.attention import scaled_dot_product_attention
from ..feedface_core.modules.encoder import build_encoder, check_encoder, encode, fingerprint, plain_weights
from ..feedface_core.state_dict import read_state_dict
from .folders import model_folders

_ENCODER_BATCH = 16


def fast_attention():
    """ComfyUI's attention, but on a CPU torch's own: ComfyUI's default there is made for little memory, and several
    times slower."""
    on_cpu = comfy.model_management.get_torch_device().type == "cpu"
    return scaled_dot_product_attention if on_cpu else optimized_attention


class LoadedAdapter:
    """What the socket FEEDFACE_ADAPTER carries. Weights reach a device only when a model or an encode needs them.

    Args:
        path: of the file.
        encoder_path: of the face encoder, for a file without it; None looks for the one it names.

    Raises:
        FileNotFoundError, FeedFaceError: as :func:`load_adapter`, or when the encoder cannot be found.
    """

    def __init__(self, path: str, encoder_path: str | None = None):
        file = load_adapter(path)
        self.path, self.name, self.config = path, Path(path).name, file.config
        self.statistics = file.statistics
        self.description = file.summary()
        self.key = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        self._encoder_tensors = {}
        if file.config.encoder.type == "clip_vision":
            self._encoder_tensors = file.encoder_tensors or read_encoder(file, encoder_path)
        self.encoder_fingerprint = file.config.encoder.fingerprint
        self._file: AdapterFile | None = file
        self._state = os.stat(path).st_mtime_ns, os.stat(path).st_size
        self._patchers: dict[tuple[str, torch.dtype], ModelPatcher] = {}
        self._encoder: ModelPatcher | None = None

    @property
    def streams(self) -> list[Stream]:
        """Of the face, and of the background where the adapter has one."""
        return [Stream(self, config) for config in self.config.streams]

    def patcher(self, dtype: torch.dtype, stream: str = "face") -> ModelPatcher:
        """The weights of a stream in a floating-point type, made once and moved between devices by ComfyUI."""
        if (stream, dtype) not in self._patchers:
            adapter = self._take_file().build(dtype, operations=comfy.ops.manual_cast, attention=fast_attention())
            management = comfy.model_management
            devices = {"load_device": management.get_torch_device(), "offload_device": management.unet_offload_device()}
            streams, adapter.background = adapter.streams, None  # each is moved on its own
            for one in streams:
                self._patchers[one.config.stream, dtype] = ModelPatcher(one, **devices)
        return self._patchers[stream, dtype]

    def _take_file(self) -> AdapterFile:
        """What was read, which is kept for the first type only; for another type the same file again."""
        file, self._file = self._file, None
        if file is None:
            if (os.stat(self.path).st_mtime_ns, os.stat(self.path).st_size) != self._state:
                raise FeedFaceError(f"{self.path} was replaced since it was loaded: queue the prompt again")
            file = load_adapter(self.path)
        return file

    def encoder_patcher(self) -> ModelPatcher:
        """The face encoder as ``["model"]`` of a patcher's model, made once and moved between devices by ComfyUI."""
        if self._encoder is None:
            model = build_encoder(self.config.encoder, self._encoder_tensors, dtype=torch.float32)
            self._encoder_tensors = {}
            # ModelPatcher sets an attribute ``device``, which is a read-only property of transformers' models.
            self._encoder = ModelPatcher(
                torch.nn.ModuleDict({"model": model}),
                comfy.model_management.get_torch_device(),
                comfy.model_management.text_encoder_offload_device(),
            )
        return self._encoder

    def encode(self, crops: Tensor, stream: str = "face") -> Tensor:
        """What a stream's encoder sees ``(N, H, W, 3)``, values 0…1 → hidden states ``(N, T, E)``, fp32, on the CPU."""
        config = next(one.encoder for one in self.config.streams if one.stream == stream)
        if config.type == "recogniser":
            return self._recognise(crops, config)
        patcher = self.encoder_patcher()
        comfy.model_management.load_model_gpu(patcher)
        progress = comfy.utils.ProgressBar(crops.shape[0])
        states = []
        for batch in crops.split(_ENCODER_BATCH):
            batch = batch.to(patcher.load_device)
            states.append(encode(patcher.model["model"], config, batch).float().cpu())
            progress.update(batch.shape[0])
        return torch.cat(states)

    def _recognise(self, crops: Tensor, config: EncoderConfig) -> Tensor:
        """Crops → a recogniser's vectors ``(N, 1, E)``. Raises :class:`FeedFaceError` for a crop without a face."""
        name, _, model = config.name.partition("/")
        found = load_recogniser(name, insightface_roots=model_folders("insightface"), model=model or None)
        vectors = vectors_of_crops(found, crops[..., :3].cpu().float(), config.crop_scale)
        if missing := [str(number) for number, vector in enumerate(vectors, 1) if vector is None]:
            raise FeedFaceError(f"{found.name} finds no face in crop {', '.join(missing)}; use another photo")
        return torch.stack(vectors)[:, None]

    def check_face(self, face: Face | People) -> None:
        """Raises :class:`FeedFaceError` for a face from an encoder this adapter was not trained with."""
        self.streams[0].check_face(face)


@dataclass(frozen=True)
class Stream:
    """One stream of a loaded adapter, which is put into a model by itself."""

    loaded: LoadedAdapter
    config: AdapterConfig

    @property
    def name(self) -> str:
        """Of the adapter's file."""
        return self.loaded.name

    @property
    def key(self) -> str:
        """Under which conditionings carry what they have for it."""
        return self.loaded.key if self.config.stream == "face" else f"{self.loaded.key}_{self.config.stream}"

    def patcher(self, dtype: torch.dtype) -> ModelPatcher:
        """Its weights; see :meth:`LoadedAdapter.patcher`."""
        return self.loaded.patcher(dtype, self.config.stream)

    @property
    def encoded_by(self) -> str:
        """What :class:`Face` says of where it comes from; a background is no face."""
        fingerprint = self.config.encoder.fingerprint
        return fingerprint if self.config.stream == "face" else f"{fingerprint}:{self.config.stream}"

    def check_face(self, face: Face | People) -> None:
        """Raises :class:`FeedFaceError` for what another encoder made, or what belongs to the other stream."""
        face = face.faces[0] if isinstance(face, People) else face  # people have one encoder
        own, shape = self.config.encoder, tuple(face.hidden.shape[1:])
        tokens = own.tokens if own.tokens == 1 else shape[0]  # of a CLIP encoder with patches any number is taken
        if shape != (tokens, own.width) or (face.encoder and face.encoder != self.encoded_by):
            node = "FeedFace Encode Faces" if self.config.stream == "face" else "FeedFace Encode Background"
            raise FeedFaceError(
                f"FeedFace: the {self.config.stream} was encoded by encoder {face.encoder or 'unknown'} ({shape[1]} "
                f"wide), but {self.name} was trained with {self.encoded_by} ({own.width} wide, {own.name}). Encode the "
                f"photos again with this adapter (node {node})."
            )


def read_encoder(file: AdapterFile, encoder_path: str | None) -> dict[str, Tensor]:
    """The encoder's weights from ``models/clip_vision``, for an adapter that leaves them out.

    Raises:
        FeedFaceError: names the encoder and every folder searched, or what the file is instead.
    """
    config = file.config.encoder
    if encoder_path is None:
        names = folder_paths.get_filename_list("clip_vision")
        wanted = config.name.rsplit("/", 1)[-1].lower()
        matches = [name for name in names if wanted in name.lower()]
        if not matches:
            searched = ", ".join(folder_paths.get_folder_paths("clip_vision"))
            raise FeedFaceError(
                f"{file.path} needs the face encoder {config.name}, which is not inside it. Looked for a file with "
                f"{wanted!r} in its name in {searched}; found {', '.join(names) or 'no files'}. Save the encoder's "
                f"model.safetensors there as {wanted}.safetensors, or choose it in the node's face_encoder input."
            )
        encoder_path = folder_paths.get_full_path_or_raise("clip_vision", matches[0])
    tensors, _ = read_state_dict(encoder_path)
    tensors = plain_weights({k: t for k, t in tensors.items() if k.startswith("vision_model.")} or tensors)
    if "embeddings.class_embedding" not in tensors:
        raise FeedFaceError(
            f"{encoder_path} is not a CLIP vision encoder with Hugging Face names; {file.path} needs {config.name}"
        )
    check_encoder(config, tensors, encoder_path)
    found = fingerprint(config, tensors)
    if found != config.fingerprint:
        expected = f"{config.fingerprint} ({config.name})" if config.fingerprint else "an encoder that it does not name"
        raise FeedFaceError(f"{encoder_path} is encoder {found}, but {file.path} was trained with {expected}")
    return tensors
