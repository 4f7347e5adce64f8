"""What a checkpoint holds of a training run, and what one optimiser step changes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import TrainerError
from .checkpoint import Checkpoint, CheckpointError, TensorFiles, newest_name, save_checkpoint
from .metrics import TrainingDiverged
from .optimiser import plain_values
from .processes import check_agreement, digest, share_checkpoint

logger = logging.getLogger(__name__)


class TrainingState:
    """Weights, optimiser state, moving average, loss scale, and the optimiser steps behind them.

    They change together: a checkpoint, which another thread may ask for at any time, is of whole steps.

    Args:
        model: its parameters that require a gradient are trained.
        optimisers: over those, each in one of them.
        ema: decay of the moving average of the weights, less in the first steps (diffusers' ``EMAModel``);
            None keeps none.
        accelerator: of the process; only the main one has a moving average, and writes checkpoints.
    """

    #: Whether each process keeps a part of it, which only all of them together can save and show.
    together = False

    def __init__(
        self, model: nn.Module, optimisers: Sequence[Optimizer], ema: float | None, accelerator: Accelerator
    ) -> None:
        self.model, self.optimisers, self.accelerator = model, optimisers, accelerator
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._parts = {name: own_part(value) for name, value in self.parameters.items()}
        self.done = self.saved = 0
        self.average: EMAModel | None = None
        if ema is not None and (self.together or accelerator.is_main_process):
            self.average = EMAModel(self._parts.values(), decay=ema, foreach=True)
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._amid_step = False

    def step(self, optimisers: Sequence[Optimizer], rate: float) -> None:
        """One optimiser step at a learning rate.

        Args:
            optimisers: those of the state, prepared by the accelerator.
        """
        with self._lock:
            self._amid_step = True
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = rate
                optimiser.step()
                optimiser.zero_grad()
            if self.average is not None:
                self.average.step(self._parts.values())
            self.done += 1
            self._amid_step = False

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the model has the moving average of its weights, where there is one."""
        parameters = self._parts.values()
        with self._lock:
            if self.average is None:
                yield
                return
            self.average.store(parameters)
            self.average.copy_to(parameters)
            try:
                yield
            finally:
                self.average.restore(parameters)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The same, and the model can be called by the main process alone. Every process enters and leaves it."""
        with self.averaged():
            yield

    def optimiser_tensors(self) -> dict[str, Tensor]:
        """The optimisers' state of each parameter, ``<state>.<parameter name>`` → tensor."""
        return {
            f"{key}.{name}": value
            for optimiser in self.optimisers
            for name, parameter in self.parameters.items()
            for key, value in optimiser.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def write(self, output: Path, metadata: Mapping[str, Any], keep: int, wait: bool = True) -> None:
        """Write a checkpoint of the steps done so far, unless there is one.

        Args:
            output, keep: see :func:`~trainer.training.checkpoint.save_checkpoint`.
            metadata: further JSON values of the checkpoint.
            wait: False copies everything into memory and leaves the writing to a thread; what goes wrong there is
                raised by the next call.

        Raises:
            CheckpointError: it cannot be written, or the one before could not.
            TrainingDiverged: the weights are not numbers.
        """
        with self._lock:
            self._settle()
            if self.saved == self.done:
                return
            if self._amid_step:
                raise CheckpointError(f"step {self.done + 1} was broken off while it changed the weights")
            if not self._finite():
                raise TrainingDiverged(
                    f"the weights after step {self.done} are not numbers. Last good checkpoint: {newest_name(output)}. "
                    "Lower optimiser.lr"
                )
            self._pending = self._start_writing(output, metadata, keep, wait)
            if wait:
                self._settle()

    def _finite(self) -> bool:
        norms = torch.stack(torch._foreach_norm([value.detach() for value in self._parts.values()]))
        return bool(torch.isfinite(norms).all())

    def _files(self) -> TensorFiles:
        files = {"trainables": self.model.state_dict(), "optimiser": self.optimiser_tensors()}
        if self.average is not None:
            files["ema"] = dict(zip(self.parameters, self.average.shadow_params, strict=True))
        return files

    def _plain(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON values of a checkpoint."""
        scaler = self.accelerator.scaler
        state = {**metadata, "step": self.done, "scaler": None if scaler is None else scaler.state_dict()}
        names = {parameter: name for name, parameter in self.parameters.items()}
        return {**state, "optimisers": [plain_values(one, names) for one in self.optimisers]}

    def _start_writing(self, output: Path, metadata: Mapping[str, Any], keep: int, wait: bool) -> Future[None]:
        files, state = self._files(), self._plain(metadata)
        if not wait:
            files = {name: {key: _copy(one) for key, one in group.items()} for name, group in files.items()}
        return self._writer.submit(self._write, lambda: save_checkpoint(output, files, state, keep), self.done)

    def _write(self, save: Callable[[], Path], step: int) -> None:
        began = time.perf_counter()
        path = save()
        self.saved = step
        logger.info("wrote %s (%.1f s)", path, time.perf_counter() - began)

    def end(self) -> None:
        """Wait for the checkpoint that is being written, and log what goes wrong with it."""
        try:
            self._settle()
        except CheckpointError as error:
            logger.error("%s", error)

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, found: Checkpoint | None) -> None:
        """Go on from the main process's checkpoint, in every process; None begins anew.

        Args:
            found: not looked at on the others.

        Raises:
            TrainerError: it is of other weights, or the processes do not start from the same.
        """
        checkpoint = share_checkpoint(self.accelerator, found)
        if checkpoint is not None:
            self.load(checkpoint)
        if self.accelerator.num_processes > 1:
            tensors = {"set of weights": self.model.state_dict(), "optimiser state": self.optimiser_tensors()}
            digests = {name: digest(own) for name, own in tensors.items()}
            check_agreement(self.accelerator, {"step to start from": self.done, **digests})

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. A run that had no moving average starts one from the weights it has reached.

        Raises:
            TrainerError: it is of other weights.
        """
        try:
            self.model.load_state_dict(checkpoint.tensors["trainables"])
        except RuntimeError as error:
            raise TrainerError(f"{checkpoint.path} is of another model than this run trains: {error}") from error
        self._load_optimisers(checkpoint)
        if self.average is not None:
            start = checkpoint.weights()
            for name, value in zip(self.parameters, self.average.shadow_params, strict=True):
                value.copy_(own_part(start[name]))
            self.average.optimization_step = checkpoint.step
        if self.accelerator.scaler is not None and checkpoint.state.get("scaler"):
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.done = self.saved = checkpoint.step
        logger.info("going on from %s", checkpoint.path)

    def _load_optimisers(self, checkpoint: Checkpoint) -> None:
        plain = checkpoint.state.get("optimisers") or []  # earlier releases had AdamW, whose state is tensors alone
        before, now = [one["class"] for one in plain], [type(one).__name__ for one in self.optimisers]
        if plain and before != now:
            text = "%s was made with the optimiser %s; %s starts without what that one had gathered"
            logger.warning(text, checkpoint.path, ", ".join(before), ", ".join(now))
            return
        saved: dict[str, dict[str, Tensor]] = {}  # parameter → state → tensor
        for name, tensor in checkpoint.tensors["optimiser"].items():
            key, _, parameter = name.partition(".")
            saved.setdefault(parameter, {})[key] = tensor
        odd = sorted(saved.keys() ^ self.parameters.keys())
        if saved and odd:
            raise TrainerError(
                f"{checkpoint.path}: the optimiser's state does not fit the trained parameters: {', '.join(odd[:3])}"
            )
        owners = {value: one for one in self.optimisers for group in one.param_groups for value in group["params"]}
        for name, states in saved.items():
            parameter, optimiser = self.parameters[name], owners[self.parameters[name]]
            counter = parameter.device if optimiser.defaults.get("fused") else "cpu"
            optimiser.state[parameter] = {
                key: value.to(counter) if key == "step" else _like(parameter, value) for key, value in states.items()
            }
        for optimiser, values in zip(self.optimisers, plain, strict=False):
            for group, own in zip(optimiser.param_groups, values["groups"], strict=False):
                group.update(own)
            for name, own in values["parameters"].items():
                optimiser.state[self.parameters[name]].update(own)


def own_part(value: Tensor) -> Tensor:
    """The part of a tensor that is in this process, in the same memory; a tensor that is not sharded, as it is."""
    if not isinstance(value, DTensor):
        return value
    return value.detach().to_local().requires_grad_(value.requires_grad)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The value where its parameter is, and laid out like it if it has its shape."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
