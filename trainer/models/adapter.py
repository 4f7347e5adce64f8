"""The adapter to train, attached to its frozen models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from feedface_core.config import AdapterConfig, TextTokensConfig
from feedface_core.errors import FeedFaceError, problems
from feedface_core.files.adapter_file import load_adapter
from feedface_core.modules.adapter import FaceAdapter
from feedface_core.modules.likeness import EncoderLikeness, FacenetLikeness, Likeness

from ..config import Config, IdentityLossSettings
from ..config.fields import as_path
from ..data.manifest import DEFAULT_RULE, CropRule
from ..errors import TrainerError
from .face_encoder import FaceEncoder, load_face_encoder
from .frozen_model import FrozenModel, load_frozen_model
from .unet import AdapterAndUnet, TrainedUnet, train_unet


@dataclass
class Models:
    """What a run is made of.

    Args:
        frozen: on the run's device.
        encoder: of the faces, frozen, on the run's device.
        adapter: float32, attached to the frozen model, on the run's device.
        recogniser: of the identity loss, on the run's device; None without that loss.
        unet: the frozen model's, where it is trained as well.
    """

    frozen: FrozenModel
    encoder: FaceEncoder
    adapter: FaceAdapter
    recogniser: Likeness | None = None
    unet: TrainedUnet | None = None

    @property
    def trained(self) -> nn.Module:
        """What checkpoints hold: the adapter, or it and what is trained of the U-Net."""
        return self.adapter if self.unet is None else AdapterAndUnet(self.adapter, self.unet)


def load_models(config: Config, device: torch.device | str, rule: CropRule = DEFAULT_RULE) -> Models:
    """Load the frozen models and make the adapter, attached.

    Args:
        rule: how the face crops were made, which the adapter's configuration says.

    Raises:
        TrainerError: for models that are missing or do not fit.
    """
    frozen = load_frozen_model(config.model, device)
    encoder = load_face_encoder(config.adapter.encoder, "cpu", config.model.allow_hub)
    adapter = make_adapter(config, adapter_config(config, frozen, encoder, rule), encoder).to(device)
    frozen.attach(adapter)
    if config.model.gradient_checkpointing:
        frozen.enable_gradient_checkpointing()
    recogniser = make_recogniser(config.loss.identity, encoder, device)
    unet = None
    if config.train.unet != "frozen":
        unet = train_unet(config, frozen, frozen.fingerprint(("host",)))
    return Models(frozen, encoder.to(device), adapter, recogniser, unet)


def make_recogniser(
    settings: IdentityLossSettings, encoder: FaceEncoder, device: torch.device | str
) -> Likeness | None:
    """The recogniser of the identity loss; None where there is none.

    Raises:
        TrainerError: a file of weights that cannot be used.
    """
    if not settings.active:
        return None
    if settings.recogniser == "encoder":
        return EncoderLikeness(encoder.module, encoder.config)
    try:
        return FacenetLikeness(as_path(settings.path, "loss.identity.path")).to(device)
    except FeedFaceError as error:
        raise TrainerError(f"loss.identity.path: {error}") from error


def adapter_config(config: Config, frozen: FrozenModel, encoder: FaceEncoder, rule: CropRule) -> AdapterConfig:
    """What the settings, the frozen model, the encoder and the face crops make of an adapter."""
    settings, text = config.adapter, config.adapter.text_tokens
    if text and settings.context_width not in (None, frozen.context_width):
        raise TrainerError(
            f"adapter.context_width is {settings.context_width}, but text_tokens have the width of the text, "
            f"{frozen.context_width}: leave it out"
        )
    own = {
        "host": frozen.family,
        "sites": () if text else tuple(frozen.sites(settings.sites, settings.heads)),
        "context_width": settings.context_width or frozen.context_width,
        "encoder": replace(encoder.config, crop_scale=rule.scale, crop_border=rule.border, crop_fill=rule.fill),
        "null": settings.null,
        "prediction": frozen.prediction,
        **settings.model_dump(include={"tap", "self_attention", "mlp", "rank", "depth"}),
    }
    tokens, background = None, None
    try:
        if text:
            tokens = TextTokensConfig(**text.model_dump())
        if settings.background:
            beside = tokens and replace(tokens, offset=tokens.count)  # of the same text
            background = AdapterConfig(**own, stream="background", text_tokens=beside)
        shown = settings.model_dump(include={"combination", "title"})
        return AdapterConfig(
            **own, **shown, max_references=config.data.references, text_tokens=tokens, background=background
        )
    except ValueError as error:
        raise TrainerError(f"adapter: {problems(error) if isinstance(error, ValidationError) else error}") from error


def make_adapter(config: Config, described: AdapterConfig, encoder: FaceEncoder) -> FaceAdapter:
    """A new adapter in float32 on the CPU, its weights drawn from the seed, or those of ``adapter.init``.

    Raises:
        TrainerError: when the adapter file to start from is of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        adapter = FaceAdapter(described, dtype=torch.float32)
    for stream in adapter.streams if described.null == "zero_crop" else ():
        stream.null_hidden.copy_(encoder.null_hidden())
    if config.adapter.init is not None:
        try:
            start = load_adapter(config.adapter.init)
        except (OSError, FeedFaceError) as error:
            raise TrainerError(f"adapter.init: {error}") from error
        if odd := first_difference(start.config, described):
            name, found, wanted = odd
            raise TrainerError(
                f"adapter.init: {config.adapter.init} differs in {name}: it has {found}, these settings make {wanted}"
            )
        adapter.load_state_dict({name: tensor.float() for name, tensor in start.tensors.items()})
    return adapter


def first_difference(found: AdapterConfig, wanted: AdapterConfig) -> tuple[str, Any, Any] | None:
    """Name and both values of what keeps the weights of one adapter from going into another; None if nothing does."""
    names = "host sites context_width tap self_attention mlp rank depth null prediction text_tokens"
    for name in names.split():
        if getattr(found, name) != getattr(wanted, name):
            return name, getattr(found, name), getattr(wanted, name)
    for name in ("width", "tokens", "layer"):
        if getattr(found.encoder, name) != getattr(wanted.encoder, name):
            return f"encoder.{name}", getattr(found.encoder, name), getattr(wanted.encoder, name)
    if found.background and wanted.background:
        return first_difference(found.background, wanted.background)
    return None if found.background == wanted.background else ("background", found.background, wanted.background)
