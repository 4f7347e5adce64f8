"""What several training processes need of one another: an accelerator, one checkpoint, one decision to stop."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor

from ..config import TrainSettings
from ..errors import TrainerError
from .checkpoint import Checkpoint

Result = TypeVar("Result")


class MainProcessFailed(TrainerError):
    """What ended the main process, told by the others, which end with it."""


def make_accelerator(settings: TrainSettings, precision: str = "fp32", accumulation: int = 1) -> Accelerator:
    """The accelerator of this process.

    Args:
        settings: ``output``, ``batch_size``, ``tracker`` and ``timeout_minutes`` are read.
        precision: of autocast: ``fp32`` (none), ``fp16`` or ``bf16``.
        accumulation: backward passes for one optimiser step.

    Raises:
        TrainerError: for a number format that the device does not have, a batch that does not divide, or FSDP and its
            like.
    """
    for engine in ("FSDP", "DeepSpeed", "Megatron-LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine.upper().replace('-', '_')}"):
            raise TrainerError(
                f"accelerate is configured for {engine}, which this trainer does not support. Choose multi-GPU without "
                "it in `accelerate config`, or launch with --multi_gpu; to shard the adapter under any launcher set "
                "train.sharding=fsdp2"
            )
    tracker = None if settings.tracker == "none" else settings.tracker
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # several processes on the CPU are not found out otherwise
            mixed_precision="no" if precision == "fp32" else precision,
            gradient_accumulation_steps=accumulation,
            log_with=tracker,
            project_config=ProjectConfiguration(settings.output, logging_dir=str(Path(settings.output) / "logs")),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=settings.timeout_minutes))],
        )
    except (ValueError, ImportError) as error:
        raise TrainerError(f"model.precision={precision}, train.tracker={tracker}: {error}") from error
    if accelerator.device.type == "cpu" and precision == "fp16":
        raise TrainerError("model.precision=fp16 needs a GPU; on the CPU use bf16 or fp32")
    if settings.batch_size % (accelerator.num_processes * accumulation):
        raise TrainerError(
            f"train.batch_size is {settings.batch_size}, which does not divide by {accelerator.num_processes} "
            f"process(es) × {accumulation} accumulation part(s)"
        )
    return accelerator


def end_processes(accelerator: Accelerator) -> None:
    """Close trackers and the process group, once what was prepared on the accelerator is no longer held elsewhere.

    A ``DistributedDataParallel`` holds the process group. Were it left to the end of the interpreter, a thread of gloo
    that lets go of a tensor then could not have Python's lock, and would abort a process that has done its work.
    """
    accelerator.free_memory()
    accelerator.end_training()


def be_deterministic() -> None:
    """Deterministic kernels, so that a resumed run is bit-identical."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result | None:
    """Do something on the main process while the others wait; its result there, None on the others.

    Raises:
        Exception: on the main process, what the action raised.
        MainProcessFailed: on the others, if it raised anything.
    """
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = action()
        except Exception as error:
            failure = error
    message = broadcast_object_list([None if failure is None else f"{type(failure).__name__}: {failure}"])[0]
    if failure is not None:
        raise failure
    if message is not None:
        raise MainProcessFailed(
            f"process {accelerator.process_index} ends with the main process, which failed: {message}"
        )
    return result


def share_checkpoint(accelerator: Accelerator, found: Checkpoint | None) -> Checkpoint | None:
    """The main process's checkpoint on every process, whatever the output folders of the others hold.

    Args:
        found: of the main process; not looked at on the others.

    Returns:
        Its state, weights and optimiser state on all; the moving average on the main process only.
    """
    if accelerator.num_processes == 1:
        return found
    layout = None
    if accelerator.is_main_process and found is not None:
        tensors = {
            name: {key: torch.empty_like(t, device="meta") for key, t in group.items()}
            for name, group in found.tensors.items()
            if name != "ema"
        }
        layout = Checkpoint(found.path, tensors, found.state)
    shared: Checkpoint | None = broadcast_object_list([layout])[0]
    if shared is None:
        return None
    for name, group in shared.tensors.items():
        for key, tensor in group.items():
            own = found.tensors[name][key] if accelerator.is_main_process else torch.empty_like(tensor, device="cpu")
            group[key] = broadcast(own.to(accelerator.device)).cpu()
    return found if accelerator.is_main_process else shared


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits over names and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def check_agreement(accelerator: Accelerator, facts: Mapping[str, object]) -> None:
    """Whether the processes start from the same.

    Args:
        facts: by what they are called in the message.

    Raises:
        TrainerError: on every process, naming the first fact that differs and where.
    """
    everywhere = gather_object([dict(facts)])
    for name, value in everywhere[0].items():
        for process, own in enumerate(everywhere):
            if own[name] != value:
                raise TrainerError(
                    f"process {process} of {len(everywhere)} has another {name} ({own[name]}) than the main process "
                    f"({value}). Give all processes the same configuration and models"
                )


class StopVote:
    """Whether to stop before the next forward pass, decided by all processes at once.

    Asking costs a wait for the device, so it is done about once a second: with each answer the main process says after
    how many passes, at the pace of the slowest pass since then, all ask again. The number grows slowly: the next passes
    may be longer than the last ones.

    Args:
        accelerator: of the process.
        requested: whether this process was asked to stop.
    """

    PERIOD, MOST_PASSES = 1.0, 16

    def __init__(self, accelerator: Accelerator, requested: Callable[[], bool]) -> None:
        self._accelerator, self._requested = accelerator, requested
        self._left, self._slowest, self._last = 0, 0.0, time.monotonic()
        self._passes = 0.5

    def __call__(self) -> bool:
        """To be called by every process before each of its passes."""
        if self._accelerator.num_processes == 1:
            return self._requested()
        now = time.monotonic()
        self._slowest, self._last = max(self._slowest, now - self._last), now
        if self._left > 0:
            self._left -= 1
            return False
        passes = 0.0
        if self._accelerator.is_main_process:
            passes = max(min(self.PERIOD / max(self._slowest, 1e-9), 2.0 * self._passes, self.MOST_PASSES), 1.0)
        own = torch.tensor([float(self._requested()), passes], device=self._accelerator.device)
        asked, self._passes = self._accelerator.reduce(own, "sum").tolist()
        self._left, self._slowest = int(self._passes) - 1, 0.0
        return asked > 0
