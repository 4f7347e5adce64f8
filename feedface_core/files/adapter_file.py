"""Adapter files: safetensors that describe themselves, and the released ``.pt``.

Keys of the tensors: ``projection.weight``, ``branches.{i}.…`` in the order of the sites, ``encoder.vision_model.…``
when the encoder is included, ``null_tokens`` or ``null_hidden`` where the config asks for one. The metadata hold the
config as JSON and the ModelSpec keys (https://github.com/Stability-AI/ModelSpec).

``python -m feedface_core.files.adapter_file FILE`` prints what a file holds.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import HOSTS, AdapterConfig
from ..modules.adapter import FaceAdapter
from ..modules.encoder import check_tensors, fingerprint, plain_name
from . import released
from .atomic import AdapterFileError, write_safetensors

FORMAT = "feedface-adapter"
FORMAT_VERSION = "1"
_ENCODER = "encoder.vision_model."
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from disk.

    Args:
        path: where it was read from.
        config: what to build.
        tensors: state dict of :class:`~feedface_core.modules.adapter.FaceAdapter`.
        encoder_tensors: the encoder's weights by their plain Hugging Face names; empty when not included.
        metadata: everything the file says about itself.
    """

    path: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    encoder_tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["projection.weight"].dtype

    def build(self, dtype: torch.dtype | None = None, **options) -> FaceAdapter:
        """The adapter with its weights, on the CPU; ``options`` as for :class:`FaceAdapter`.

        Args:
            dtype: floating-point type of the weights; that of the file when None.
        """
        dtype = dtype or self.dtype
        # Built without storage and then given the file's tensors: no time is spent on random values.
        adapter = FaceAdapter(self.config, device="meta", dtype=dtype, **options)
        adapter.load_state_dict({name: tensor.to(dtype) for name, tensor in self.tensors.items()}, assign=True)
        return adapter.eval().requires_grad_(False)


def expected_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an adapter with this config."""
    adapter = FaceAdapter(config, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}


def save_adapter(
    path: str | os.PathLike,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    encoder_tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes an adapter file, under a temporary name first so that a half-written file never carries the final one.

    Args:
        path: a name that ends in ``.safetensors``.
        config: its ``encoder.included`` and ``encoder.fingerprint`` are set from what is given.
        tensors: state dict of the adapter.
        encoder_tensors: weights of the encoder by their Hugging Face names, to include it.
        metadata: further metadata, strings only; overrides the ModelSpec keys made here.
        dtype: floating-point type to store, unchanged when None.

    Raises:
        ValueError: for another extension, or tensors that do not fit the config.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: adapters are written as .safetensors")
    check_tensors(f"{path.name}", expected_shapes(config), tensors)
    encoder = replace(config.encoder, included=bool(encoder_tensors))
    if encoder_tensors:
        encoder = replace(encoder, fingerprint=fingerprint(encoder, encoder_tensors))
    config = replace(config, encoder=encoder)
    stored = {name: _stored(tensor, dtype) for name, tensor in tensors.items()}
    for name, tensor in (encoder_tensors or {}).items():
        if not name.endswith("position_ids"):
            stored[_ENCODER + plain_name(name)] = _stored(tensor, dtype)
    described = {**adapter_metadata(config, stored), **(metadata or {})}
    return write_safetensors(path, stored, described)


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous().clone()


def adapter_metadata(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata of an adapter file with these stored tensors: format, config, ModelSpec keys."""
    architecture = {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-512",
        "sdxl": "stable-diffusion-xl-v1-base",
    }.get(config.host, config.host)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.to_json(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/feedface",
        "modelspec.implementation": "feedface",
        "modelspec.title": config.title or "FeedFace adapter",
        "modelspec.resolution": "1024x1024" if config.host == "sdxl" else "512x512",
        "modelspec.prediction_type": config.prediction,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.hash_sha256": "0x" + _tensor_hash(tensors),
    }


def _tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_adapter(path: str | os.PathLike) -> AdapterFile:
    """Reads an adapter and checks every key and shape against its config. Never runs code from a file.

    Raises:
        FileNotFoundError: the path does not exist.
        AdapterFileError: the file is truncated, not an adapter, holds code, or does not fit its own config.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    found = _read_pickle(path) if path.suffix.lower() in _PICKLES else _read_safetensors(path)
    try:
        check_tensors(path.name, expected_shapes(found.config), found.tensors)
    except ValueError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    if found.config.encoder.included != bool(found.encoder_tensors):
        raise AdapterFileError(
            f"{path}: the config says the face encoder is "
            f"{'included' if found.config.encoder.included else 'left out'}, the file differs"
        )
    return found


def _read_safetensors(path: Path) -> AdapterFile:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys())
            if metadata.get("format") != FORMAT:
                raise AdapterFileError(
                    f"{path} is not a FeedFace adapter: expected format={FORMAT!r} in its metadata, "
                    f"found {_describe_other(metadata, names)}"
                )
            if metadata.get("format_version") != FORMAT_VERSION:
                raise AdapterFileError(
                    f"{path}: adapter format version {metadata.get('format_version')!r}; this "
                    f"version of FeedFace reads {FORMAT_VERSION!r}. Update FeedFace."
                )
            try:
                config = AdapterConfig.from_json(metadata.get("config", ""))
            except ValueError as error:
                raise AdapterFileError(f"{path}: {error}") from error
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{path} cannot be read as safetensors ({error}); it is truncated or of another kind "
            f"({path.stat().st_size} bytes). Download or export it again."
        ) from error
    encoder = {name.removeprefix(_ENCODER): tensors.pop(name) for name in names if name.startswith(_ENCODER)}
    return AdapterFile(str(path), config, tensors, encoder, metadata)


def _read_pickle(path: Path) -> AdapterFile:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for foreign, truncated and unsafe files
        raise AdapterFileError(
            f"{path} cannot be read as weights only ({type(error).__name__}): it is truncated, of an older pickle "
            "format, or holds code, which is never run. Expected the released feed-4800000.pt or a .safetensors file."
        ) from error
    config, tensors, encoder = released.read_adapter(state, path)
    return AdapterFile(str(path), config, tensors, encoder, {"format": "released FeedFace checkpoint"})


def _describe_other(metadata: Mapping[str, str], names: list[str]) -> str:
    known = (
        ("model.diffusion_model.", "a full checkpoint (put it in models/checkpoints)"),
        ("lora_unet_", "a LoRA (models/loras)"),
        ("image_proj", "an IP-Adapter or InstantID file"),
        ("vision_model.", "a CLIP vision encoder (models/clip_vision)"),
        ("face.", "a saved face (models/feedface/faces; use FeedFace Load Face)"),
    )
    if metadata.get("format", "").startswith("feedface"):
        return f"format={metadata['format']!r}"
    for prefix, text in known:
        if any(name.startswith(prefix) for name in names):
            return text
    return f"{len(names)} tensors such as {', '.join(names[:3])}" if names else "an empty file"


def describe(found: AdapterFile) -> str:
    """A few lines for people: host, sites, sizes, encoder, provenance."""
    config = found.config
    count = sum(tensor.numel() for tensor in found.tensors.values())
    encoder_count = sum(tensor.numel() for tensor in found.encoder_tensors.values())
    widths = ", ".join(str(width) for width in sorted({site.width for site in config.sites}))
    lines = [
        f"file          {found.path} ({Path(found.path).stat().st_size / 1e6:.1f} MB, {_type_name(found.dtype)})",
        f"title         {config.title or found.metadata.get('modelspec.title', '-')}",
        f"host          {config.host}: {HOSTS[config.host]}, {config.prediction} prediction",
        f"sites         {len(config.sites)} of widths {widths}; {config.sites[0].name} … {config.sites[-1].name}",
        f"branch        tap {config.tap}, {config.depth} block(s), "
        f"{'with' if config.self_attention else 'without'} self-attention, {count / 1e6:.1f} M parameters",
        f"face tokens   {config.encoder.tokens} of width {config.encoder.width} for each reference → "
        f"{config.context_width}",
        f"encoder       {config.encoder.name} ({config.encoder.fingerprint or 'no fingerprint'}), "
        + (f"included, {encoder_count / 1e6:.1f} M parameters" if found.encoder_tensors else "not included"),
        f"crops         {config.encoder.crop_scale:g} × the box, {config.encoder.crop_border} at the border, "
        f"{config.encoder.image_size} px, mean {config.encoder.image_mean}, std {config.encoder.image_std}",
        f"defaults      strength {config.strength}, {config.combination}, at most {config.max_references} references, "
        f"dropped face: {config.null}",
    ]
    lines += [
        f"{key[len('modelspec.') :]:<13} {value}"
        for key, value in sorted(found.metadata.items())
        if key in ("modelspec.date", "modelspec.hash_sha256", "modelspec.license", "modelspec.author")
    ]
    return "\n".join(lines)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m feedface_core.files.adapter_file", description="Shows what an adapter holds."
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print the config as JSON instead")
    options = parser.parse_args(arguments)
    try:
        found = load_adapter(options.file)
    except (FileNotFoundError, AdapterFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(json.loads(found.config.to_json()), indent=2) if options.json else describe(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
