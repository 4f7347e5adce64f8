"""Training with weights, gradients, optimiser and moving average sharded over the processes (FSDP2).

torch's ``fully_shard`` gathers a module's parameters when the module is called, and reduces their gradient when the
backward pass has left it. Here that cannot hang on calls: which branches a pass calls, and how often, follows from the
faces of its batch, and each process has another batch. So every group of parameters is owned by a module that is never
called. All groups are gathered, in order, when a pass begins; when its backward pass ends, their gradients are reduced
and they are freed: the same communication in every pass of every process. Between passes each holds its part only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..config import TrainSettings
from ..errors import TrainerError
from .checkpoint import Checkpoint, load_checkpoint
from .processes import check_agreement, digest, on_main
from .sharded_checkpoint import SEPARATOR, ShardedSave, join, read_into, read_layout, split, storage
from .state import TrainingState

#: Optimisers that treat each number by itself, and so a part of the weights as the whole.
ELEMENTWISE = {"Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "Rprop", "SGD", "ASGD"}


class _Group(nn.Module):
    """Owns a module's parameters as one group; never called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class ShardedStep(nn.Module):
    """A step whose parameters are sharded.

    Args:
        step: from a batch to the loss and its record; every parameter has a gradient after each backward pass, if it is
            one of zeros.
        groups: modules below it; the parameters of each are gathered and reduced together. The others are one group.
        device: of the process.
    """

    def __init__(self, step: nn.Module, groups: Sequence[nn.Module], device: torch.device) -> None:
        super().__init__()
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.step, self.groups = step, nn.ModuleList(_Group(module) for module in groups)
        frozen = {one for one in step.parameters() if not one.requires_grad}
        for group in self.groups:
            fully_shard(group, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
        others = frozen | set(self.groups.parameters())
        fully_shard(self, mesh=mesh, reshard_after_forward=False, ignored_params=others)

    def forward(self, batch: Any) -> Any:
        for group in self.groups:
            group.unshard()
        return self.step(batch)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the modules have their whole weights; every process enters and leaves it."""
        modules: list[FSDPModule] = [self, *self.groups]
        for module in modules:
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()


def shard(
    step: nn.Module, model: nn.Module, groups: Sequence[nn.Module], settings: TrainSettings, accelerator: Accelerator
) -> ShardedStep:
    """Shard a step's parameters over the processes, which have the same ones.

    Args:
        model: below the step; what it holds is compared between the processes first.

    Raises:
        TrainerError: what sharding cannot do, or processes that differ.
    """
    if accelerator.mixed_precision == "fp16":
        raise TrainerError(
            "train.sharding=fsdp2 does not go with model.precision=fp16, whose loss scale one process would change "
            "without the others; take bf16 or fp32"
        )
    storage(Path(settings.output), write=False)
    _check_folder(Path(settings.output), accelerator)
    check_agreement(accelerator, {"set of weights": digest(model.state_dict())})
    return ShardedStep(step, groups, accelerator.device)


def check_optimisers(optimisers: Sequence[Optimizer]) -> None:
    """Raises ``TrainerError`` for one that looks at more than one number of a weight at a time."""
    for one in optimisers:
        if type(one).__module__.split(".")[0] != "torch" or type(one).__name__ not in ELEMENTWISE:
            raise TrainerError(
                f"train.sharding=fsdp2 does not go with the optimiser {type(one).__name__}, which looks at a weight as "
                "a whole, where each process has a part. Set optimiser.name to adamw, "
                f"{', '.join(sorted(ELEMENTWISE - {'AdamW'}))}"
            )


def _check_folder(output: Path, accelerator: Accelerator) -> None:
    """Whether all processes see the main one's folder, which all write to."""
    token = f".seen-by-all-{accelerator.num_processes}"
    on_main(accelerator, lambda: (output.mkdir(parents=True, exist_ok=True), (output / token).touch()))
    check = {"train.output than the one that all must write to with train.sharding=fsdp2": (output / token).exists()}
    check_agreement(accelerator, check)
    on_main(accelerator, (output / token).unlink)


class ShardedState(TrainingState):
    """The same as :class:`~trainer.training.state.TrainingState` where each process keeps a part: every process calls
    every method, at the same time."""

    together = True

    def __init__(self, step: ShardedStep, timeout: timedelta, *arguments: Any) -> None:
        super().__init__(*arguments)
        check_optimisers(self.optimisers)
        self._step = step
        # For checkpoints alone, since these are written beside the communication of the training.
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it the model has its averaged weights, whole, in every process."""
        with self.averaged(), self._step.gathered():
            yield

    def _files(self) -> dict[str, dict[str, Tensor]]:
        files = dict(super()._files())
        if "ema" in files:
            files["ema"] = {name: _in_place_of(self.parameters[name], value) for name, value in files["ema"].items()}
        return files

    def _finite(self) -> bool:
        bad = torch.tensor([0.0 if super()._finite() else 1.0], device=self.accelerator.device)
        return float(self.accelerator.reduce(bad, "sum")) == 0.0

    def _start_writing(self, output: Path, metadata: Mapping[str, Any], keep: int, wait: bool) -> Future[None]:
        save = ShardedSave(output, self._plain(metadata), keep, self._group)
        save.start(join(self._files()))
        return self._writer.submit(self._write, save.finish, self.done)

    def restore(self, found: Checkpoint | None) -> None:
        """As in a run that is not sharded; any checkpoint will do. The main process's, if it is sharded, is read by all
        from the same folder.

        Args:
            found: its tensors need not have been read.
        """
        checkpoint: Checkpoint | None = broadcast_object_list([found and Checkpoint(found.path, {}, found.state)])[0]
        if checkpoint is None:
            return
        if checkpoint.sharded:
            tensors = self._empty(read_layout(checkpoint.path))
            read_into(checkpoint.path, tensors, self._group)
        else:
            tensors = self._spread(checkpoint.path)
        self.load(Checkpoint(checkpoint.path, {"optimiser": {}, **split(tensors)}, checkpoint.state))

    def _spread(self, path: Path) -> dict[str, Tensor]:
        """A checkpoint that only the main process has, in parts on all."""
        main = self.accelerator.is_main_process
        whole = join(load_checkpoint(path).tensors) if main else {}
        layout = broadcast_object_list([{name: (one.shape, one.dtype) for name, one in whole.items()}])[0]
        tensors = self._empty(layout)
        for name, (shape, dtype) in layout.items():
            device = self.accelerator.device
            one = broadcast(whole[name].to(device) if main else torch.empty(shape, dtype=dtype, device=device))
            if isinstance(tensors[name], DTensor):
                mesh, placements = tensors[name].device_mesh, tensors[name].placements
                one = distribute_tensor(one, mesh, placements, src_data_rank=None)
            tensors[name] = one
        return tensors

    def _empty(self, layout: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """Tensors of these shapes and types; what belongs to a weight and has its shape is sharded as that is."""
        tensors: dict[str, Tensor] = {}
        for name, (shape, dtype) in layout.items():
            group, _, own = name.partition(SEPARATOR)
            parameter = self.parameters.get(own.partition(".")[2] if group == "optimiser" else own)
            if parameter is not None and parameter.shape == shape:
                tensors[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            else:
                tensors[name] = torch.zeros(shape, dtype=dtype)
        return tensors


def _in_place_of(parameter: Tensor, part: Tensor) -> Tensor:
    """A part of something, as the DTensor that it is of if the parameter is one."""
    if not isinstance(parameter, DTensor):
        return part
    where = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part.detach(), *where, run_check=False, shape=parameter.shape, stride=parameter.stride())
