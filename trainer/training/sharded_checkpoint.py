"""Checkpoints that all processes write together, by torch.distributed.checkpoint, and read at any number of processes.

Each process writes what it keeps to one safetensors file, ``shard-<process>-…``; the header says which part of each
tensor that is. So nothing is pickled here either, and a single process reads the files without the others. The folder
gets its name, its state and its manifest as any checkpoint does, once all files are on the disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp

from ..errors import TrainerError
from .checkpoint import SHARD, CheckpointError, describe_file, make_room, publish, writing

Result = TypeVar("Result")
SEPARATOR = "/"  # between the name of a file of other checkpoints, and that of a tensor in it


def storage(path: Path, write: bool) -> Any:
    """What reads or writes the safetensors files of a folder.

    Raises:
        TrainerError: this torch has none.
    """
    try:
        if write:
            return dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        return dcp.HuggingFaceStorageReader(str(path))
    except (AttributeError, TypeError) as error:
        raise TrainerError(
            "sharded checkpoints need a torch whose torch.distributed.checkpoint writes safetensors (2.9 or newer). "
            f"Found: {torch.__version__}. Update torch, or set train.sharding=none"
        ) from error


def read_layout(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of each whole tensor of a sharded checkpoint."""
    found = storage(path, write=False).read_metadata().state_dict_metadata
    return {name: (one.size, one.properties.dtype) for name, one in found.items()}


def read_into(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill tensors, whole ones or DTensors, from a sharded checkpoint.

    Args:
        group: of the processes that do so together; None reads alone.

    Raises:
        CheckpointError: it does not hold them, or not in these shapes.
    """
    reader = storage(path, write=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # alone, as asked
            dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error


def read_shards(path: Path) -> dict[str, dict[str, Tensor]]:
    """The whole tensors of a sharded checkpoint, read by this process alone: as in :class:`~.checkpoint.Checkpoint`."""
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in read_layout(path).items()}
    read_into(path, tensors)
    return split(tensors)


def join(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several files under one name each."""
    return {f"{group}{SEPARATOR}{name}": one for group, own in groups.items() for name, one in own.items()}


def split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The reverse of :func:`join`."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, own = name.partition(SEPARATOR)
        groups.setdefault(group, {})[own] = tensor
    return groups


class ShardedSave:
    """One checkpoint as all processes of a group write it. Each of them calls both methods.

    Args:
        output: the run's folder, on a disk that all of them see.
        state, keep: see :func:`~trainer.training.checkpoint.save_checkpoint`.
        group: gloo, and used for nothing else meanwhile.
    """

    def __init__(self, output: Path, state: Mapping[str, Any], keep: int, group: dist.ProcessGroup) -> None:
        self.output, self.state, self.keep, self.group = output, state, keep, group
        self._saved: Future | None = None

    def start(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy everything into memory; a thread begins to write it.

        Raises:
            CheckpointError: there is no room.
        """
        needed = sum(tensor.nbytes for tensor in tensors.values())
        with writing(self.output, int(self.state["step"])) as self._folder:
            pass
        self._alone(lambda: make_room(self._folder, needed))
        writer = storage(self._folder, write=True)
        # A copy of what is on the CPU too: training goes on in it while it is written.
        copies = {
            name: tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach()
            for name, tensor in tensors.items()
        }
        self._saved = dcp.async_save(copies, storage_writer=writer, process_group=self.group)

    def finish(self) -> Path:
        """Wait for all files, and make them a checkpoint.

        Raises:
            CheckpointError: any process could not write its own; the folder goes away.
        """
        described: list[tuple[str, Mapping]] = []
        failure: str | None = None
        try:
            self._saved.result()
            own = f"{SHARD}{dist.get_rank(self.group) + 1:05d}-*"
            described = [describe_file(path) for path in self._folder.glob(own)]
        except Exception as error:  # told to all, which wait for it
            failure = _reason(error)
        everywhere: list[tuple[list, str | None]] = [([], None)] * dist.get_world_size(self.group)
        dist.all_gather_object(everywhere, (described, failure), group=self.group)

        def complete() -> Path:
            reasons = [f"process {rank}: {reason}" for rank, (_, reason) in enumerate(everywhere) if reason is not None]
            if reasons:
                raise OSError("; ".join(reasons))
            return publish(self._folder, self.state, [one for own, _ in everywhere for one in own], self.keep)

        return self._alone(complete)

    def _alone(self, action: Callable[[], Result]) -> Result:
        """Something that the first process does for all; what comes of it, or goes wrong, is the same in all."""
        told: list[Any] = [None, None]
        if dist.get_rank(self.group) == 0:
            try:
                with writing(self.output, int(self.state["step"])):
                    told = [action(), None]
            except Exception as error:
                told = [None, str(error)]
        dist.broadcast_object_list(told, src=dist.get_global_rank(self.group, 0), group=self.group)
        if told[1] is not None:
            raise CheckpointError(told[1])
        return told[0]


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, out of what torch wraps round it."""
    if isinstance(error, dcp.CheckpointException):
        rank, (inner, _) = min(error.failures.items())
        return f"{type(inner).__name__}: {inner}".splitlines()[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]
