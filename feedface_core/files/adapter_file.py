"""Adapter files: safetensors that describe themselves, and the released ``.pt``.

Keys of the tensors: ``projection.weight``, ``branches.{i}.…`` in the order of the sites, ``encoder.vision_model.…``
when the encoder is included, ``null_tokens`` or ``null_hidden`` where the config asks for one; ``projection.{i}.…`` of
the MLP of an adapter into text tokens; ``background.…`` for all of a second stream; ``statistics.mean`` and
``statistics.components`` of the faces it was trained with (:class:`FaceStatistics`). The metadata hold the
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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..arithmetic import FaceStatistics
from ..config import HOSTS, AdapterConfig, EncoderConfig
from ..errors import FeedFaceError, located, shorten
from ..modules.adapter import FaceAdapter
from ..modules.encoder import check_encoder, fingerprint, plain_weights
from ..state_dict import check_tensors, describe, identify, read_state_dict
from . import released
from .atomic import write_safetensors

FORMAT = "feedface-adapter"
FORMAT_VERSION = "1"
#: Whose licence an adapter file may state, and under which key of its metadata.
LICENCES = {"licence": "modelspec.license", "of the base": "license.base", "of the encoder": "license.encoder"}
#: Metadata of an adapter whose training changed the U-Net as well: how, and the name of the file beside it.
UNET_KIND, UNET_FILE = "unet.kind", "unet.file"
UNET_NODES = {"lora": "Load LoRA", "full": "Load Diffusion Model"}
_ENCODER = "encoder.vision_model."
_STATISTICS = "statistics."
_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from disk: its config, the state dict of :class:`FaceAdapter`, the encoder's weights by their
    plain Hugging Face names (empty when not included), and the statistics of the faces it was trained with (None in
    a file without)."""

    path: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    encoder_tensors: dict[str, Tensor]
    metadata: dict[str, str]
    statistics: FaceStatistics | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(tensor.dtype for name, tensor in self.tensors.items() if name.startswith("projection."))

    def build(self, dtype: torch.dtype | None = None, **options) -> FaceAdapter:
        """The adapter with its weights, on the CPU, in ``dtype`` or the file's; options of :class:`FaceAdapter`."""
        dtype = dtype or self.dtype
        # Built without storage and then given the file's tensors: no time is spent on random values.
        adapter = FaceAdapter(self.config, device="meta", dtype=dtype, **options)
        adapter.load_state_dict({name: tensor.to(dtype) for name, tensor in self.tensors.items()}, assign=True)
        return adapter.eval().requires_grad_(False)

    def summary(self) -> str:
        """A few lines for people: host, sites, sizes, encoder, provenance."""
        config, encoder = self.config, self.config.encoder
        weights, encoder_weights = (
            f"{sum(tensor.numel() for tensor in tensors.values()) / 1e6:.1f} M parameters"
            for tensors in (self.tensors, self.encoder_tensors)
        )
        size, dtype = Path(self.path).stat().st_size / 1e6, str(self.dtype).removeprefix("torch.")
        included = f"included, {encoder_weights}" if self.encoder_tensors else "not included"
        lines = {
            "file": f"{self.path} ({size:.1f} MB, {dtype})",
            "title": config.title or self.metadata.get("modelspec.title", "-"),
            "host": f"{config.host}: {HOSTS[config.host]}, {config.prediction} prediction",
            "weights": weights,
            "U-Net": self._unet(),
            **{part: text for stream in config.streams for part, text in _stream_summary(stream).items()},
            "encoder": f"{encoder.name} ({encoder.fingerprint or 'no fingerprint'}), {included}",
            "crops": f"{encoder.crop_scale:g} × the box, {encoder.crop_border} at the border, {encoder.image_size} px, "
            f"mean {encoder.image_mean}, std {encoder.image_std}",
            "defaults": f"strength {config.strength}, {config.combination}, at most {config.max_references} "
            f"references, dropped face: {config.null}",
            **{key: self.metadata.get(f"modelspec.{key}") for key in ("author", "date", "hash_sha256")},
            **{name: self.metadata.get(key) or "not stated" for name, key in LICENCES.items()},
        }
        return "\n".join(f"{name:<14} {text}" for name, text in lines.items() if text)

    def _unet(self) -> str:
        """Which file the U-Net needs, where training changed it; empty where it did not."""
        node = UNET_NODES.get(self.metadata.get(UNET_KIND, ""))
        return f"trained along; load {shorten(self.metadata.get(UNET_FILE))} with {node} as well" if node else ""


def _stream_summary(config: AdapterConfig) -> dict[str, str]:
    encoder, stream = config.encoder, "" if config.stream == "face" else f"{config.stream} "
    tokens = f"{encoder.tokens} of width {encoder.width} for each reference"
    if config.text_tokens:
        text = f"{tokens} → the last {config.text_tokens.count} of the text's, of width {config.context_width}"
        return {f"{stream or 'face '}tokens": text}
    widths = ", ".join(map(str, sorted({site.width for site in config.sites})))
    return {
        f"{stream}sites": f"{len(config.sites)} of widths {widths}; {config.sites[0].name} … {config.sites[-1].name}",
        f"{stream}branch": f"tap {config.tap}, {config.depth} block(s), "
        f"{'with' if config.self_attention else 'without'} self-attention"
        f"{'' if config.mlp else ', without MLP'}{f', rank {config.rank}' if config.rank else ''}",
        f"{stream or 'face '}tokens": f"{tokens} → {config.context_width}",
    }


def expected_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an adapter with this config; nothing is allocated."""
    adapter = FaceAdapter(config, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}


def save_adapter(
    path: str | os.PathLike,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    encoder_tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    statistics: FaceStatistics | None = None,
) -> Path:
    """Writes an adapter file, under a temporary name first so that a half-written file never carries the final one.

    Args:
        path: a name that ends in ``.safetensors``.
        config: its ``encoder.included`` and ``encoder.fingerprint`` are set from what is given.
        tensors: state dict of the adapter.
        encoder_tensors: weights of the encoder by their Hugging Face names, to include it.
        metadata: further metadata, strings only; overrides the ModelSpec keys made here.
        dtype: floating-point type to store, unchanged when None; an encoder is stored in float16 for bfloat16.
        statistics: of faces, from which random ones are drawn; stored in float16.

    Raises:
        FeedFaceError: for another extension, or tensors that do not fit the config.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise FeedFaceError(f"{path}: adapters are written as .safetensors")
    check_tensors(path.name, expected_shapes(config), tensors)
    cast = [
        {name: tensor.detach().to("cpu", kind, copy=True).contiguous() for name, tensor in weights.items()}
        for weights, kind in ((tensors, dtype), (plain_weights(encoder_tensors or {}), encoder_dtype(dtype)))
    ]
    stored, described = adapter_contents(config, *cast)
    if statistics is not None:
        stored |= {f"{_STATISTICS}{name}": tensor.half() for name, tensor in vars(statistics).items()}
    return write_safetensors(path, stored, {**described, **(metadata or {})})


def encoder_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """The type of an encoder beside an adapter in ``dtype``: its fingerprint is of half precision, and bfloat16 would
    make another encoder of it."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def adapter_contents(
    config: AdapterConfig, tensors: Mapping[str, Tensor], encoder_tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What an adapter file with these weights holds, in the types they are stored in: tensors and metadata."""
    config = replace(config, encoder=_described(config.encoder, encoder_tensors))
    if config.background:
        background = replace(config.background, encoder=_described(config.background.encoder, encoder_tensors))
        config = replace(config, background=background)
    stored = {**tensors, **{_ENCODER + name: tensor for name, tensor in encoder_tensors.items()}}
    digest = hashlib.sha256()
    for name in sorted(stored):
        digest.update(name.encode())
        digest.update(stored[name].reshape(-1).view(torch.uint8).numpy())
    return stored, {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.to_json(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_ARCHITECTURES.get(config.host, config.host)}/feedface",
        "modelspec.implementation": "feedface",
        "modelspec.title": config.title or "FeedFace adapter",
        "modelspec.resolution": "1024x1024" if config.host == "sdxl" else "512x512",
        "modelspec.prediction_type": config.prediction,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.hash_sha256": "0x" + digest.hexdigest(),
    }


def _described(encoder: EncoderConfig, tensors: Mapping[str, Tensor]) -> EncoderConfig:
    """An encoder's config that says whether its weights are in the file, and which they are."""
    if not tensors:
        return replace(encoder, included=False)
    return replace(encoder, included=True, fingerprint=fingerprint(encoder, tensors))


def load_adapter(path: str | os.PathLike) -> AdapterFile:
    """Reads an adapter and checks every key, shape and value against its config. Never runs code from a file.

    Raises:
        MissingFile: the path does not exist.
        FeedFaceError: the file is truncated, not an adapter, holds code, or does not fit its own config.
    """
    tensors, metadata = read_state_dict(path)
    statistics = None
    with located(path):
        if metadata.get("format") == FORMAT:
            if (version := metadata.get("format_version")) != FORMAT_VERSION:
                raise FeedFaceError(
                    f"adapter format version {shorten(version)}; this version of FeedFace reads {FORMAT_VERSION!r}. "
                    "Update FeedFace."
                )
            config = AdapterConfig.from_json(metadata.get("config", ""))
            encoder, stored = (
                {name.removeprefix(start): tensors.pop(name) for name in list(tensors) if name.startswith(start)}
                for start in (_ENCODER, _STATISTICS)
            )
            statistics = FaceStatistics.of_tensors(stored, config.encoder.tokens, config.encoder.width)
        elif identify(tensors) == "released_adapter":
            config, tensors, encoder = released.read_adapter(tensors, released.settings_for(path, tensors))
            metadata = {"format": "released FeedFace checkpoint"}
        else:
            other = metadata.get("format", "")
            found = f"found {shorten(other)}" if other.startswith("feedface") else describe(tensors)
            raise FeedFaceError(
                f"not a FeedFace adapter: expected format={FORMAT!r} in its metadata or the released adapter's "
                f"{released.SIGNATURE}, but {found}"
            )
        _check(config, tensors, encoder)
    return AdapterFile(str(path), config, tensors, encoder, metadata, statistics)


def _check(config: AdapterConfig, tensors: Mapping[str, Tensor], encoder_tensors: Mapping[str, Tensor]) -> None:
    for stream in config.streams:  # counted before anything of the config's size is built
        start = "branches." if stream.stream == "face" else f"{stream.stream}.branches."
        branches = len({name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)})
        if branches != len(stream.sites) or branches * stream.depth > len(tensors):
            raise FeedFaceError(
                f"the config has {len(stream.sites)} sites with {stream.depth} blocks each, the file {branches} "
                f"{start[:-1]} of {len(tensors)} tensors"
            )
    check_tensors("adapter", expected_shapes(config), tensors)
    encoder = config.encoder
    if encoder.included != bool(encoder_tensors):
        included = "included" if encoder.included else "left out"
        raise FeedFaceError(f"the config says the face encoder is {included}, the file differs")
    if encoder_tensors:
        check_encoder(encoder, encoder_tensors)
        if encoder.fingerprint != (actual := fingerprint(encoder, encoder_tensors)):
            raise FeedFaceError(
                f"the face encoder inside is {actual}, but the adapter was trained with "
                f"{encoder.fingerprint or 'one it does not name'}; export the adapter again"
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m feedface_core.files.adapter_file", description="Shows an adapter.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print the config as JSON instead")
    options = parser.parse_args(arguments)
    try:
        found = load_adapter(options.file)
    except FeedFaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(json.loads(found.config.to_json()), indent=2) if options.json else found.summary())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
