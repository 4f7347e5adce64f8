"""The training loop: resume, step, log, save, stop."""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from feedface_core.config import AdapterConfig

from ..data.unreadable import PhotoBudget
from .build import Parts, SetupError, check_same_adapter
from .checkpoint import Checkpoint, CheckpointError, list_checkpoints, load_latest, save_checkpoint
from .metrics import LogFile, Meter, StepRecord, Sums, TrainingDiverged
from .optimiser import (
    MovingAverage,
    learning_rate,
    load_optimiser_tensors,
    make_optimiser,
    optimiser_tensors,
    set_learning_rate,
)
from .processes import MainProcessFailed, StopVote, check_agreement, digest, on_main, share_checkpoint
from .step import Plan, TrainingStep, encode_batch
from .validation import ValidationStopped

if TYPE_CHECKING:
    from ..config import Config
    from ..data.batch import Batch

logger = logging.getLogger(__name__)

Batches = Callable[[int], Iterator["Batch"]]
Validate = Callable[[int], None]


class Trainer:
    """Trains an adapter's branches, projection and null tokens.

    Args:
        config: the whole configuration.
        accelerator: of the process.
        parts: base, encoder and adapter.
        batches: from the first optimiser step to do, this process's batches.
        validate: called on the main process with the number of steps done; None makes no pictures.
        data: what checkpoints say of the data (:meth:`trainer.data.dataset.FaceDataset.described`).
        stop_requested: whether this process was asked to stop.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        parts: Parts,
        batches: Batches,
        validate: Validate | None = None,
        data: dict | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.config, self.accelerator, self.parts, self.batches = config, accelerator, parts, batches
        self.validate, self.data = validate, data
        self.output = Path(config.train.output)
        self.stop = StopVote(accelerator, stop_requested)
        self.done = self.saved = 0
        self.failed_validations = 0
        self.photo_budget = PhotoBudget(config.data.unreadable_photos)
        self._lock = threading.Lock()  # the weights belong to the steps done, and so does a checkpoint
        self._amid_step = False
        self.parameters = dict(parts.adapter.named_parameters())
        self.fingerprint = parts.base.fingerprint(("host",))
        optimiser = make_optimiser(self.parameters, config.optimiser)
        self.average = None
        if config.train.ema is not None and accelerator.is_main_process:
            self.average = MovingAverage(self.parameters, config.train.ema)
        module = TrainingStep(parts.adapter, parts.base, config.loss, config.adapter.combination)
        self._plain_optimiser, self._module = optimiser, module
        self._restore()
        self._check_agreement()
        self.step_module, self.optimiser = accelerator.prepare(module, optimiser)
        self.meter = Meter(parts.base.schedule.steps)
        self.log_file = LogFile(self.output / "log.jsonl")
        if accelerator.is_main_process:
            self.log_file.cut(self.done)

    # --- checkpoints -------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Go on from the newest sound checkpoint of the main process, on all processes."""
        checkpoint = share_checkpoint(self.accelerator, on_main(self.accelerator, self._find_checkpoint))
        if checkpoint is not None:
            self._load(checkpoint)

    def _find_checkpoint(self) -> Checkpoint | None:
        checkpoint = load_latest(self.output)
        if checkpoint is None:
            return None
        if not self.config.train.resume:
            raise SetupError(
                f"train.output: {self.output} holds {checkpoint.path.name}, and train.resume is false. Give another "
                "folder, or train.resume=true to go on"
            )
        state = checkpoint.state
        if state["base"] != self.fingerprint:
            raise SetupError(
                f"{checkpoint.path} was trained on another base ({state['base_name']}, {state['base']}) than "
                f"{self.config.model.base} ({self.fingerprint}), or at another model.precision. Give that base, or "
                "another train.output"
            )
        saved = AdapterConfig.from_json(state["adapter"])
        check_same_adapter(saved, self.parts.adapter.config, str(checkpoint.path))
        self._warn_of_changes(state)
        return checkpoint

    def _check_agreement(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        facts = {
            "base": self.fingerprint,
            "adapter": self.parts.adapter.config.to_json(),
            "step to start from": self.done,
            "set of weights": digest(self.parts.adapter.state_dict()),
            "optimiser state": digest(optimiser_tensors(self._plain_optimiser, self.parameters)),
        }
        check_agreement(self.accelerator, facts)

    def _load(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors
        self.parts.adapter.load_state_dict(tensors["trainables"])
        load_optimiser_tensors(self._plain_optimiser, self.parameters, tensors["optimiser"])
        if self.average is not None:
            # A run that had no average starts one from the weights it has reached.
            self.average.load(tensors.get("ema") or {k: v.detach() for k, v in self.parameters.items()})
        if self.accelerator.scaler is not None and checkpoint.state.get("scaler"):
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.done = self.saved = checkpoint.step
        logger.info("going on from %s", checkpoint.path)

    def _warn_of_changes(self, state: dict) -> None:
        old, new = (
            _flat(json.loads(config.to_json())) for config in (self.config.from_json(state["config"]), self.config)
        )
        ignored = (
            "train.output",
            *(["train.steps"] if self.config.optimiser.schedule == "constant" else []),
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
        changed = [
            f"{name} {old.get(name)!r} → {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name) and not name.startswith(ignored)
        ]
        before, now = state.get("data"), self.data
        if before is not None and now is not None and before != now:
            counts = f"{before['photos']} photos, now {now['photos']}"
            changed.append(f"the records of the data set ({counts}; their captions, boxes, people or order)")
        if changed:
            told = ", ".join(changed)
            logger.warning("going on with other settings than before, so the run is no longer reproducible: %s", told)

    def save(self) -> None:
        """Write a checkpoint of the steps done so far, on the main process; the others wait.

        Raises:
            CheckpointError, TrainingDiverged: it cannot be written, or the weights are not numbers.
            MainProcessFailed: the same, on the other processes.
        """
        on_main(self.accelerator, self._write)

    def save_beside(self) -> None:
        """The same from another thread, while the main thread is in a pass that takes too long. No process waits."""
        if self.accelerator.is_main_process:
            self._write()

    def _write(self) -> None:
        with self._lock:
            if self.saved == self.done:
                return
            began = time.perf_counter()
            if self._amid_step:
                raise CheckpointError(f"step {self.done + 1} was broken off while it changed the weights")
            self._refuse_broken_weights()
            files = {
                "trainables": dict(self.parts.adapter.state_dict()),
                "optimiser": optimiser_tensors(self._plain_optimiser, self.parameters),
            }
            if self.average is not None:
                files["ema"] = self.average.values
            scaler = self.accelerator.scaler
            state = {
                "step": self.done,
                "samples": self.done * self.config.train.batch_size,
                "config": self.config.to_json(),
                "adapter": self.parts.adapter.config.to_json(),
                "base": self.fingerprint,
                "base_name": self.config.model.base,
                "data": self.data,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            path = save_checkpoint(self.output, files, state, self.config.train.keep)
            self.saved = self.done
            logger.info("wrote %s (%.1f s)", path, time.perf_counter() - began)

    def _refuse_broken_weights(self) -> None:
        norms = torch.stack(torch._foreach_norm([value.detach() for value in self.parameters.values()]))
        if not torch.isfinite(norms).all():
            raise TrainingDiverged(
                f"the weights after step {self.done} are not numbers. Last good checkpoint: {self._kept()}. Lower "
                "optimiser.lr"
            )

    def _kept(self) -> str:
        return next((str(path) for path in list_checkpoints(self.output)), "none")

    # --- the loop ----------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train until ``train.steps`` optimiser steps are done, or until asked to stop; both leave a
        checkpoint.

        Returns:
            Whether all steps are done.

        Raises:
            TrainingDiverged: a loss or weight that is no number; the last good checkpoint is kept.
            CheckpointError: a checkpoint that cannot be written; likewise.
            MainProcessFailed: either of them, on the other processes.
            Exception: whatever else goes wrong, after a checkpoint of the steps done.
        """
        try:
            self._loop()
        except (TrainingDiverged, CheckpointError, MainProcessFailed):
            raise
        except Exception:
            self._save_after_exception()
            raise
        return self.done >= self.config.train.steps

    def _loop(self) -> None:
        settings, logged = self.config.train, self.done
        for batch in self.batches(self.done):
            if self.stop():  # amid a step, too: what its first passes have gathered is dropped
                break
            if not self._forward_backward(batch):
                continue
            save = self.done >= settings.steps or self.done % settings.checkpoint_every == 0
            if save or self.done % settings.log_every == 0:
                self._log()
                logged = self.done
            if save:
                self._pausing(self.save)
            if settings.validate_every is not None and self.done % settings.validate_every == 0:
                self._pausing(self._validate)
        if logged != self.done:
            self._log()
        self.save()

    def _save_after_exception(self) -> None:
        """On the main process alone: the others may be gone."""
        if not self.accelerator.is_main_process:
            return
        try:
            self._write()
        except Exception as error:  # the first exception is the one to show
            logger.error("an exception ends the run, and nothing could be saved: %s", error)
        else:
            logger.error("an exception ends the run; last good checkpoint: %s", self._kept())

    def _forward_backward(self, batch: Batch) -> bool:
        """One part of a step; True when the optimiser has stepped."""
        accelerator = self.accelerator
        plan = self._module.plan(batch)
        record = self._record(batch, plan)
        batch = batch.to(accelerator.device)
        with accelerator.accumulate(self.step_module):
            features = encode_batch(batch, self.parts.base, self.parts.encoder)
            loss, losses = self.step_module(batch, features, plan)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                clip = self.config.optimiser.clip
                self.meter.add_norm(
                    accelerator.clip_grad_norm_(self.parameters.values(), float("inf") if clip is None else clip)
                )
                set_learning_rate(
                    self._plain_optimiser, learning_rate(self.done, self.config.train.steps, self.config.optimiser)
                )
                self._step()
        self.meter.add(StepRecord(**record, losses=losses), len(batch))
        self.meter.add_unreadable(batch.unreadable)
        return accelerator.sync_gradients

    def _step(self) -> None:
        with self._lock:
            self._amid_step = True
            self.optimiser.step()
            self.optimiser.zero_grad()
            if self.average is not None:
                self.average.update(self.parameters, self.done)
            self.done += 1
            self._amid_step = False

    def _record(self, batch: Batch, plan: Plan) -> dict:
        timesteps, areas = batch.timesteps.tolist(), batch.masks.mean((1, 2, 3)).tolist()
        return {
            "step": self.done,
            "ids": [batch.ids[row] for row in plan.rows],
            "kinds": plan.kinds,
            "timesteps": [timesteps[row] for row in plan.rows],
            "areas": [areas[row] for row in plan.rows],
        }

    def _pausing(self, action: Callable[[], None]) -> None:
        began = time.perf_counter()
        action()
        self.meter.pause(time.perf_counter() - began)

    def _validate(self) -> None:
        """Pictures on the main process. Nothing that goes wrong with them ends the run."""
        on_main(self.accelerator, self._make_pictures)

    def _make_pictures(self) -> None:
        if self.validate is None:
            return
        averaged = nullcontext() if self.average is None else self.average.applied(self.parameters)
        try:
            with self._lock, averaged:
                self.validate(self.done)
        except ValidationStopped:
            logger.info("left the pictures of step %d out, to stop", self.done)
        except Exception as error:
            self.failed_validations += 1
            logger.warning(
                "the pictures of step %d failed (%d so far), training goes on: %s",
                self.done,
                self.failed_validations,
                "".join(traceback.format_exception_only(error)).strip(),
            )

    def _log(self) -> None:
        sums = Sums.over_processes(gather_object([self.meter.take()]))
        sums.check(self._kept())
        if self.photo_budget.exceeded_by(sums.unreadable):  # the same photos in all processes: all stop together
            self.save()
            raise self.photo_budget.error(self.done)
        if not self.accelerator.is_main_process:
            return
        values = sums.means()
        if self.photo_budget.photos:
            values["unreadable photos"] = len(self.photo_budget.photos)
        if self.failed_validations:
            values["failed validations"] = self.failed_validations
        values["learning rate"] = learning_rate(self.done - 1, self.config.train.steps, self.config.optimiser)
        self.log_file.write(self.done, values)
        self.accelerator.log(values, step=self.done)
        logger.info(
            "step %d of %d: loss %s, gradient norm %.3g, %.2f samples/s",
            self.done,
            self.config.train.steps,
            f"{values['loss']:.4f}" if "loss" in values else "– (no face in these steps)",
            values.get("gradient norm", 0.0),
            values["samples per second"],
        )


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
