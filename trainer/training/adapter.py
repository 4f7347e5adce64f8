"""Adapter training as a use of the trainer: its models, what its checkpoints say, and whether one fits a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from feedface_core.config import AdapterConfig
from feedface_core.files.adapter_file import AdapterFileError, load_adapter
from feedface_core.modules.adapter import FaceAdapter

from ..config import Config
from ..data.batch import Batch
from ..data.manifest import DEFAULT_RULE, CropRule
from ..data.unreadable import PhotoBudget
from ..errors import TrainerError
from ..models.face_encoder import FaceEncoder, load_face_encoder
from ..models.frozen_model import FrozenModel, load_frozen_model
from .checkpoint import Checkpoint
from .processes import check_agreement
from .step import AdapterStep
from .stopping import StopRequest
from .trainer import Trainer

logger = logging.getLogger(__name__)

#: Settings that may change when a run goes on.
CHANGEABLE = (
    "train.output",
    "train.log",
    "train.keep",
    "train.checkpoint_every",
    "train.validate_every",
    "train.tracker",
    "train.resume",
    "train.timeout_minutes",
    "validation.",
    "data.workers",
    "data.unreadable_photos",
)


@dataclass
class Models:
    """What a run is made of.

    Args:
        frozen: on the run's device.
        encoder: of the faces, frozen, on the run's device.
        adapter: float32, attached to the frozen model, on the run's device.
    """

    frozen: FrozenModel
    encoder: FaceEncoder
    adapter: FaceAdapter


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
    return Models(frozen, encoder.to(device), adapter)


def adapter_config(config: Config, frozen: FrozenModel, encoder: FaceEncoder, rule: CropRule) -> AdapterConfig:
    """What the settings, the frozen model, the encoder and the face crops make of an adapter."""
    settings = config.adapter
    return AdapterConfig(
        host=frozen.family,
        sites=tuple(frozen.sites(settings.sites, settings.heads)),
        context_width=settings.context_width or frozen.context_width,
        encoder=replace(encoder.config, crop_scale=rule.scale, crop_border=rule.border, crop_fill=rule.fill),
        tap=settings.tap,
        self_attention=settings.self_attention,
        depth=settings.depth,
        null=settings.null,
        combination=settings.combination,
        max_references=config.data.references,
        prediction=frozen.prediction,
        title=settings.title,
    )


def make_adapter(config: Config, described: AdapterConfig, encoder: FaceEncoder) -> FaceAdapter:
    """A new adapter in float32 on the CPU, its weights drawn from the seed, or those of ``adapter.init``.

    Raises:
        TrainerError: when the adapter file to start from is of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        adapter = FaceAdapter(described, dtype=torch.float32)
    if described.null == "zero_crop":
        adapter.null_hidden.copy_(encoder.null_hidden())
    if config.adapter.init is not None:
        try:
            start = load_adapter(config.adapter.init)
        except (FileNotFoundError, AdapterFileError) as error:
            raise TrainerError(f"adapter.init: {error}") from error
        if odd := differences(start.config, described):
            name, found, wanted = odd[0]
            raise TrainerError(
                f"adapter.init: {config.adapter.init} differs in {name}: it has {found}, these settings make {wanted}"
            )
        adapter.load_state_dict({name: tensor.float() for name, tensor in start.tensors.items()})
    return adapter


def differences(found: AdapterConfig, wanted: AdapterConfig) -> list[tuple[str, Any, Any]]:
    """Name and both values of what keeps the weights of one adapter from going into another."""

    def fields(config: AdapterConfig) -> dict[str, Any]:
        names = ("host", "sites", "context_width", "tap", "self_attention", "depth", "null", "prediction")
        encoder = config.encoder
        return {
            **{name: getattr(config, name) for name in names},
            "encoder width and tokens": (encoder.width, encoder.tokens),
            "encoder layer": encoder.layer,
        }

    old, new = fields(found), fields(wanted)
    return [(name, old[name], new[name]) for name in new if old[name] != new[name]]


def adapter_trainer(
    config: Config,
    accelerator: Accelerator,
    models: Models,
    batches: Callable[[int], Iterable[Batch]],
    validate: Callable[[int], object] | None = None,
    data: dict | None = None,
    stop: StopRequest | None = None,
) -> Trainer:
    """The trainer of an adapter's branches, projection and null tokens.

    Args:
        batches: from the first optimiser step to do to this process's batches.
        validate: called on the main process with the number of steps done; None makes no pictures.
        data: what checkpoints say of the data (:meth:`trainer.data.dataset.FaceDataset.described`).
        stop: see :class:`~trainer.training.trainer.Trainer`.

    Raises:
        TrainerError: a checkpoint of another adapter or frozen model, or processes that differ in theirs.
    """
    metadata = {
        "config": config.to_json(),
        "adapter": models.adapter.config.to_json(),
        "base": models.frozen.fingerprint(("host",)),
        "base_name": config.model.base,
        "data": data,
    }
    check_agreement(accelerator, {"base": metadata["base"], "adapter": metadata["adapter"]})
    return Trainer(
        config.train,
        config.optimiser,
        accelerator,
        AdapterStep(models, config.loss, config.adapter.combination),
        models.adapter,
        batches,
        metadata=metadata,
        check=lambda checkpoint: check_checkpoint(checkpoint, config, metadata),
        validate=validate,
        photo_budget=PhotoBudget(config.data.unreadable_photos),
        stop=stop,
    )


def check_checkpoint(checkpoint: Checkpoint, config: Config, metadata: dict) -> None:
    """Whether a run can go on from a checkpoint; warns of other settings and data.

    Args:
        metadata: what the run's own checkpoints say.

    Raises:
        TrainerError: it is of another frozen model or adapter.
    """
    state = checkpoint.state
    if state["base"] != metadata["base"]:
        raise TrainerError(
            f"{checkpoint.path} was trained on another base ({state['base_name']}, {state['base']}) than "
            f"{config.model.base} ({metadata['base']}), or at another model.precision. Give that base, or another "
            "train.output"
        )
    if odd := differences(*(AdapterConfig.from_json(text) for text in (state["adapter"], metadata["adapter"]))):
        name, found, wanted = odd[0]
        raise TrainerError(
            f"{checkpoint.path} holds an adapter with {name} = {found}, these settings make {wanted}. Give another "
            "train.output, or the settings of that run"
        )
    ignored = CHANGEABLE + (("train.steps",) if config.optimiser.schedule == "constant" else ())
    old, new = (_flat(one.model_dump(mode="json")) for one in (Config.from_json(state["config"]), config))
    changed = [
        f"{name} {old.get(name)!r} → {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(ignored)
    ]
    before, now = state.get("data"), metadata["data"]
    if before and now and before != now:
        counts = f"{before['photos']} photos, now {now['photos']}"
        changed.append(f"the records of the data set ({counts}; their captions, boxes, people or order)")
    if changed:
        listed = ", ".join(changed)
        logger.warning("going on with other settings than before, so the run is no longer reproducible: %s", listed)


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
