"""From the configuration to the parts of a run: frozen models, adapter, samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from feedface_core.config import AdapterConfig
from feedface_core.files.adapter_file import AdapterFileError, load_adapter
from feedface_core.modules.adapter import FaceAdapter

from ..data.manifest import DEFAULT_RULE, CropRule
from ..models.face_encoder import FaceEncoder, load_face_encoder
from ..models.frozen_model import Base, load_base

if TYPE_CHECKING:
    from ..config import Config


class SetupError(ValueError):
    """Parts that do not fit together."""


@dataclass
class Parts:
    """What a run is made of.

    Args:
        base: frozen, on the run's device.
        encoder: frozen, on the run's device.
        adapter: float32, attached to the base, on the run's device.
    """

    base: Base
    encoder: FaceEncoder
    adapter: FaceAdapter


def adapter_config(config: Config, base: Base, encoder: FaceEncoder, rule: CropRule = DEFAULT_RULE) -> AdapterConfig:
    """What the settings, the base, the encoder and the face crops make of an adapter."""
    settings = config.adapter
    return AdapterConfig(
        host=base.family,
        sites=tuple(base.sites(settings.sites, settings.heads)),
        context_width=settings.context_width or base.context_width,
        encoder=replace(encoder.config, crop_scale=rule.scale, crop_border=rule.border, crop_fill=rule.fill),
        tap=settings.tap,
        self_attention=settings.self_attention,
        depth=settings.depth,
        null=settings.null,
        combination=settings.combination,
        max_references=config.data.references,
        prediction=base.schedule.prediction,
        title=settings.title,
    )


def make_adapter(config: Config, described: AdapterConfig, encoder: FaceEncoder) -> FaceAdapter:
    """A new adapter in float32 on the CPU, its weights drawn from the seed, or those of ``adapter.init``.

    Raises:
        SetupError: when the adapter file to start from is of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        adapter = FaceAdapter(described, dtype=torch.float32)
    if described.null == "zero_crop":
        adapter.null_hidden.copy_(encoder.null_hidden())
    if config.adapter.init is not None:
        _start_from(adapter, config.adapter.init)
    return adapter


def _start_from(adapter: FaceAdapter, path: str) -> None:
    try:
        start = load_adapter(path)
    except (FileNotFoundError, AdapterFileError) as error:
        raise SetupError(f"adapter.init: {error}") from error
    wanted, found = _shape(adapter.config), _shape(start.config)
    if wanted != found:
        odd = [name for name in wanted if wanted[name] != found[name]]
        raise SetupError(
            f"adapter.init: {path} differs in {odd[0]}: it has {found[odd[0]]}, these settings make {wanted[odd[0]]}"
        )
    adapter.load_state_dict({name: tensor.float() for name, tensor in start.tensors.items()})


def _shape(described: AdapterConfig) -> dict[str, object]:
    """What has to agree for weights to go from one adapter to another."""
    encoder = described.encoder
    return {
        "host": described.host,
        "sites": described.sites,
        "context_width": described.context_width,
        "tap": described.tap,
        "self_attention": described.self_attention,
        "depth": described.depth,
        "null": described.null,
        "prediction": described.prediction,
        "encoder width and tokens": (encoder.width, encoder.tokens),
        "encoder layer": encoder.layer,
    }


def check_same_adapter(saved: AdapterConfig, wanted: AdapterConfig, where: str) -> None:
    """Whether a checkpoint's weights go into this run's adapter.

    Raises:
        SetupError: naming the first difference.
    """
    old, new = _shape(saved), _shape(wanted)
    for name, value in new.items():
        if old[name] != value:
            raise SetupError(
                f"{where} holds an adapter with {name} = {old[name]}, these settings make {value}. Give another "
                "train.output, or the settings of that run"
            )


def build_parts(config: Config, device: torch.device | str, rule: CropRule = DEFAULT_RULE) -> Parts:
    """Load the frozen models and make the adapter, attached.

    Args:
        rule: how the face crops were made, which the adapter's configuration says.

    Raises:
        BaseError, EncoderError, SetupError: for models that are missing or do not fit.
    """
    base = load_base(config.model, device)
    encoder = load_face_encoder(config.adapter.encoder, "cpu", config.model.allow_hub)
    described = adapter_config(config, base, encoder, rule)
    adapter = make_adapter(config, described, encoder).to(device)
    encoder.to(device)
    base.attach(adapter)
    if config.model.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    return Parts(base, encoder, adapter)
