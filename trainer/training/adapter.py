"""Adapter training as a use of the trainer: what its checkpoints say, and whether one fits a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from accelerate import Accelerator

from feedface_core.config import AdapterConfig

from ..config import Config
from ..data.batch import Batch
from ..data.unreadable import PhotoBudget
from ..errors import TrainerError
from ..models.adapter import Models, first_difference
from .checkpoint import Checkpoint
from .processes import check_agreement
from .step import AdapterStep
from .stopping import StopRequest
from .trainer import Trainer

logger = logging.getLogger(__name__)

#: Settings that may change when a run goes on.
CHANGEABLE = {
    "train": set(
        "output keep background_saves resume log_every checkpoint_every validate_every tracker timeout_minutes".split()
    )
    | {"sharding"},
    "data": {"workers", "unreadable_photos"},
    "validation": True,
}


def adapter_trainer(
    config: Config,
    accelerator: Accelerator,
    models: Models,
    batches: Callable[[int], Iterable[Batch]],
    validate: Callable[[int], object] | None = None,
    data: dict | None = None,
    stop: StopRequest | None = None,
    measure: Callable[[], Mapping[str, float]] | None = None,
) -> Trainer:
    """The trainer of an adapter's branches, projection and null tokens, and of the U-Net where it is trained.

    Args:
        batches, validate, stop: see :class:`~trainer.training.trainer.Trainer`.
        measure: of a run with held-out people, every ``validation.loss_every`` steps.
        data: what checkpoints say of the data (:meth:`trainer.data.dataset.FaceDataset.described`).

    Raises:
        TrainerError: a checkpoint of another adapter or frozen model, or processes that differ in theirs.
    """
    unet = models.unet
    metadata = {
        "config": config.to_json(),
        "adapter": models.adapter.config.to_json(),
        "unet": None if unet is None else unet.described,
        "base": models.frozen.fingerprint(("host",)) if unet is None else unet.released,
        "base_name": config.model.base,
        "data": data,
    }
    check_agreement(accelerator, {name: metadata[name] for name in ("base", "adapter")})
    return Trainer(
        config.train,
        config.optimiser,
        accelerator,
        AdapterStep(models, config.loss, config.adapter.combination),
        models.trained,
        batches,
        metadata=metadata,
        check=lambda checkpoint: check_checkpoint(checkpoint, config, metadata),
        validate=validate,
        measure=None if measure is None else (config.validation.loss_every, measure),
        groups=[branch for stream in models.adapter.streams for branch in stream.branches],
        photo_budget=PhotoBudget.of(config.data, (data or {}).get("photos", 0)),
        stop=stop,
    )


def check_checkpoint(checkpoint: Checkpoint, config: Config, metadata: dict[str, Any]) -> None:
    """Whether a run can go on from a checkpoint; warns of other settings and data.

    Args:
        metadata: what the run's own checkpoints say.

    Raises:
        TrainerError: it is of another frozen model or adapter.
    """
    state, advice = checkpoint.state, "Give another train.output, or the settings of that run"
    if state["base"] != metadata["base"]:
        raise TrainerError(
            f"{checkpoint.path} was trained on another base ({state['base_name']}, {state['base']}) than "
            f"{config.model.base} ({metadata['base']}), or at another model.precision. {advice}"
        )
    if odd := first_difference(*(AdapterConfig.from_json(own["adapter"]) for own in (state, metadata))):
        raise TrainerError(
            f"{checkpoint.path} holds an adapter with {odd[0]} = {odd[1]}, these settings make {odd[2]}. {advice}"
        )
    if state.get("unet") != metadata["unet"]:
        before, now = (json.dumps(own) if own else "a frozen U-Net" for own in (state.get("unet"), metadata["unet"]))
        raise TrainerError(f"{checkpoint.path} was trained with {before}, these settings make {now}. {advice}")
    saved = Config.from_json(state["config"])
    old, new = (_flat(one.model_dump(mode="json", exclude=CHANGEABLE)) for one in (saved, config))
    if config.optimiser.schedule == "constant":
        del old["train.steps"], new["train.steps"]
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    changed = [f"{name} {old.get(name)!r} → {new.get(name)!r}" for name in names]
    before, now = state.get("data"), metadata["data"]
    if before and now and before != now:
        counts = f"{before['photos']} photos, now {now['photos']}"
        changed.append(f"the records of the data set ({counts}; their captions, boxes, people or order)")
    if changed:
        listed = ", ".join(changed)
        logger.warning("going on with other settings than before, so the run is no longer reproducible: %s", listed)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
