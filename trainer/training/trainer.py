"""The training loop, whatever is trained: resume, step, log, save, validate, stop."""

from __future__ import annotations

import json
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..config import OptimiserSettings, TrainSettings
from ..data.jsonl import keep_lines
from ..data.unreadable import PhotoBudget
from ..errors import TrainerError
from .checkpoint import Checkpoint, CheckpointError, load_latest, newest_name
from .metrics import Meter, Sums, TrainingDiverged
from .optimiser import learning_rate, make_optimiser
from .processes import MainProcessFailed, StopVote, on_main
from .sharding import ShardedState, shard
from .state import TrainingState
from .stopping import Interrupted, StopRequest

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a module.

    Example::

        settings = TrainSettings(output="runs/x", steps=1000, batch_size=8, validate_every=None, tracker="none")
        accelerator = make_accelerator(settings, "bf16")
        with run_lock(Path(settings.output)), StopRequest() as stop:
            trainer = Trainer(settings, OptimiserSettings(lr=1e-3), accelerator, Step(model), model, batches, stop=stop)
            finished = trainer.run()
        model.load_state_dict(load_latest(trainer.output).weights())  # the moving average, where it is kept

    Args:
        settings: length, checkpoints, logs, moving average.
        optimiser_settings: AdamW and the learning rate.
        accelerator: of the process, see :func:`trainer.training.processes.make_accelerator`.
        step: a module with ``model`` below it. Called with a batch, it gives the loss to minimise, a number, and a
            :class:`~trainer.training.metrics.Record`. Autocast is on as the accelerator says.
        model: its parameters that require a gradient are trained, its state dict is what checkpoints hold.
        batches: from the number of optimiser steps done to the batches of this process from there on, of any type. What
            a step draws at random has to follow from its batch, for a resumed run to be the same.
        metadata: JSON values that go into the checkpoints.
        check: called on the main process with the checkpoint to go on from; raises ``TrainerError`` if it does not fit.
        validate: called on the main process with the number of steps done, every ``settings.validate_every``, while the
            model has its averaged weights.
        measure: called on the main process every so many steps, likewise; the numbers it returns are logged.
        optimisers: over all trained parameters, each in one of them; None makes the one of the settings.
        groups: modules below ``model`` whose weights are gathered together with ``train.sharding=fsdp2``.
        photo_budget: how many samples may be unreadable.
        stop: a signal, or who sets its ``requested``, ends the run with a checkpoint.

    Attributes:
        state: weights, optimisers, moving average and ``done``, the number of optimiser steps behind them.

    Raises:
        TrainerError: a checkpoint that does not fit, or processes that do not start from the same.
    """

    def __init__(
        self,
        settings: TrainSettings,
        optimiser_settings: OptimiserSettings,
        accelerator: Accelerator,
        step: nn.Module,
        model: nn.Module,
        batches: Callable[[int], Iterable[Any]],
        *,
        metadata: Mapping[str, Any] | None = None,
        check: Callable[[Checkpoint], None] = lambda checkpoint: None,
        validate: Callable[[int], object] | None = None,
        measure: tuple[int, Callable[[], Mapping[str, float]]] | None = None,
        optimisers: Sequence[Optimizer] | None = None,
        groups: Sequence[nn.Module] = (),
        photo_budget: PhotoBudget | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.settings, self.optimiser_settings, self.accelerator = settings, optimiser_settings, accelerator
        self.batches, self.metadata, self.check = batches, dict(metadata or {}), check
        self.measure, self.measured = measure, {}
        self.validate, self.photo_budget, self.stop = validate, photo_budget, stop
        self.output = Path(settings.output)
        self.log_path = self.output / "log.jsonl"
        self.meter = Meter()
        self.failed_validations = 0
        self._stop_vote = StopVote(accelerator, lambda: stop is not None and stop.requested)
        sharded = settings.sharding == "fsdp2" and accelerator.num_processes > 1
        if sharded:
            if optimisers:
                raise TrainerError("train.sharding=fsdp2 makes the optimiser itself, after sharding: give none")
            step = shard(step, model, groups, settings, accelerator)
        if not optimisers:
            optimisers = [make_optimiser([one for one in model.parameters() if one.requires_grad], optimiser_settings)]
        of = model, optimisers, settings.ema, accelerator
        timeout = timedelta(minutes=settings.timeout_minutes)
        self.state = ShardedState(step, timeout, *of) if sharded else TrainingState(*of)
        self._restore()
        self.step = accelerator.prepare_model(step, evaluation_mode=sharded)  # evaluation: no DDP round it
        self.optimisers = [accelerator.prepare_optimizer(one) for one in optimisers]

    # --- checkpoints -------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Go on from the newest sound checkpoint of the main process, on all processes."""
        state, accelerator = self.state, self.accelerator
        state.restore(on_main(accelerator, self._find_checkpoint))
        if accelerator.is_main_process and self.log_path.is_file():
            # What a run that was killed logged after its last checkpoint comes again.
            keep_lines(self.log_path, lambda line: isinstance(line, dict) and line.get("step", math.inf) <= state.done)

    def _find_checkpoint(self) -> Checkpoint | None:
        self.output.mkdir(parents=True, exist_ok=True)
        checkpoint = load_latest(self.output, tensors=not self.state.together)
        if checkpoint is None:
            return None
        if not self.settings.resume:
            raise TrainerError(
                f"train.output: {self.output} holds {checkpoint.path.name}, and train.resume is false. Give another "
                "folder, or train.resume=true to go on"
            )
        self.check(checkpoint)
        return checkpoint

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of the steps done so far, on the main process while the others wait; a sharded one on all.

        Args:
            wait: False returns once everything is copied; a thread writes it.

        Raises:
            CheckpointError, TrainingDiverged: it cannot be written, or the weights are not numbers.
            MainProcessFailed: the same, on the other processes.
        """
        if self.state.together:
            self._write(wait)
        else:
            on_main(self.accelerator, partial(self._write, wait))

    def _write(self, wait: bool = True) -> None:
        samples = self.state.done * self.settings.batch_size
        self.state.write(self.output, {**self.metadata, "samples": samples}, self.settings.keep, wait)

    def _save_here(self) -> None:
        """Without waiting for other processes; from another thread, beside a pass that takes too long.

        Raises:
            CheckpointError: as for any checkpoint, and for a sharded one, which takes all processes.
        """
        if self.state.together:
            raise CheckpointError(
                f"a sharded run saves between two passes only; last good checkpoint: {newest_name(self.output)}"
            )
        if self.accelerator.is_main_process:
            self._write()

    # --- the loop ----------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train until ``settings.steps`` optimiser steps are done, or until asked to stop; both leave a checkpoint.

        Returns:
            Whether all steps are done.

        Raises:
            TrainingDiverged: a loss or weight that is no number; the last good checkpoint is kept.
            CheckpointError: a checkpoint that cannot be written; likewise.
            MainProcessFailed: either of them, on the other processes.
            Exception: whatever else goes wrong, after a checkpoint of the steps done.
        """
        if self.stop is not None:
            self.stop.listen(self._save_here)
        try:
            self._loop()
        except (TrainingDiverged, CheckpointError, MainProcessFailed):
            raise
        except Exception:
            if self.accelerator.is_main_process:  # the other processes may be gone
                self._save_after_exception()
            raise
        finally:
            self.state.end()
        return self.state.done >= self.settings.steps

    def _save_after_exception(self) -> None:
        try:
            self._save_here()
        except Exception as error:  # the first exception is the one to show
            logger.error("an exception ends the run, and nothing could be saved: %s", error)
        else:
            logger.error("an exception ends the run; last good checkpoint: %s", newest_name(self.output))

    def _loop(self) -> None:
        settings, state, logged = self.settings, self.state, self.state.done
        for batch in self.batches(state.done) if state.done < settings.steps else ():
            if self._stop_vote():  # amid a step, too: what its first passes have gathered is dropped
                break
            if not self._forward_backward(batch):
                continue
            finished = state.done >= settings.steps
            save = finished or state.done % settings.checkpoint_every == 0
            began = time.perf_counter()
            measure = self.measure is not None and state.done % self.measure[0] == 0
            if measure:
                with state.shown():
                    on_main(self.accelerator, self._measure)
            self.meter.since += time.perf_counter() - began
            if save or measure or state.done % settings.log_every == 0:
                self._log()
                logged = state.done
            began = time.perf_counter()
            if save:
                self.save(wait=finished or not self.settings.background_saves)
            if settings.validate_every is not None and state.done % settings.validate_every == 0:
                with state.shown():
                    on_main(self.accelerator, self._validate)
            self.meter.since += time.perf_counter() - began
            if finished:
                break
        if logged != state.done:
            self._log()
        self.save()

    def _forward_backward(self, batch: Any) -> bool:
        """One pass; True when it was the last of its optimiser step."""
        accelerator, number = self.accelerator, self.state.done
        with accelerator.accumulate(self.step):
            loss, record = self.step(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                clip = self.optimiser_settings.clip or math.inf
                norm = accelerator.clip_grad_norm_(self.state.parameters.values(), clip)
                self.meter.norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm.detach())
                self.state.step(self.optimisers, learning_rate(number, self.settings.steps, self.optimiser_settings))
        self.meter.records.append((number, record))
        return accelerator.sync_gradients

    def _measure(self) -> None:
        self.measured = dict(self.measure[1]())

    def _validate(self) -> None:
        """Nothing that goes wrong here ends the run."""
        if self.validate is None:
            return
        try:
            self.validate(self.state.done)
        except Interrupted:
            logger.info("left the pictures of step %d out, to stop", self.state.done)
        except Exception as error:
            self.failed_validations += 1
            reason = "".join(traceback.format_exception_only(error)).strip()
            message = "the pictures of step %d failed (%d so far), training goes on: %s"
            logger.warning(message, self.state.done, self.failed_validations, reason)

    def _log(self) -> None:
        meter, self.meter = self.meter, Meter()
        sums = Sums.over_processes(gather_object([meter.read()]))
        sums.check(newest_name(self.output))
        budget, done = self.photo_budget, self.state.done
        if budget is not None and budget.exceeded_by(sums.unreadable):  # the same in all processes: all stop together
            self.save()
            raise budget.error(done)
        if not self.accelerator.is_main_process:
            return
        values = sums.means()
        if budget is not None and budget.photos:
            values["unreadable photos"] = len(budget.photos)
        if self.failed_validations:
            values["failed validations"] = self.failed_validations
        values |= self.measured
        self.measured = {}
        values["learning rate"] = learning_rate(done - 1, self.settings.steps, self.optimiser_settings)
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": done, **values}) + "\n")
        self.accelerator.log(values, step=done)
        logger.info(
            "step %d of %d: loss %s, gradient norm %.3g, %.2f samples/s",
            done,
            self.settings.steps,
            f"{values['loss']:.4f}" if "loss" in values else "– (no face in these steps)",
            values.get("gradient norm", 0.0),
            values["samples per second"],
        )
