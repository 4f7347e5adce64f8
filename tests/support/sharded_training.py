"""A module to shard: parameters that do not divide, and branches that a process calls as its batch says.

``python -m support.sharded_training FOLDER`` is what each of two processes does for ``tests/trainer/training/
test_sharding.py``; the outcome of each part is in ``FOLDER/outcomes-<rank>.json``.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config import OptimiserSettings, TrainSettings
from trainer.training import sharded_checkpoint
from trainer.training.metrics import Record
from trainer.training.processes import make_accelerator
from trainer.training.trainer import Trainer

STEPS, SAVED = 8, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 5).requires_grad_(False)
        self.branches = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 1)  # a bias of one number: none is left for the second process
        self.register_buffer("scale", torch.tensor(2.0))


class Step(nn.Module):
    """Twelve samples from the number that is its batch; each process has its share of them."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: tuple[int, int, int]) -> tuple[torch.Tensor, Record]:
        number, process, processes = batch
        share = 12 // processes
        x = torch.randn(12, 4, generator=torch.Generator().manual_seed(number))
        where = torch.arange(12) % 3 if number % 2 else torch.arange(12) // 6  # even: one process has no branch 1
        x, where = (one[process * share : (process + 1) * share] for one in (x, where))
        losses, touch = [], sum(value.sum() for value in self.model.parameters()) * 0.0
        for one, branch in zip(x, where.tolist(), strict=True):
            hidden = self.model.frozen(one).relu()
            if branch:
                hidden = hidden + self.model.branches[branch - 1](self.model.branches[2](hidden))
            losses.append((self.model.head(hidden) * self.model.scale - one.sum()).float().square().squeeze())
        losses = torch.stack(losses)
        return losses.mean() + touch, Record(share, losses.detach())


def make_trainer(
    output: Path, steps: int = STEPS, rate: dict | None = None, precision: str = "fp32", **changes
) -> Trainer:
    values = {
        "batch_size": 12,
        "ema": 0.9,
        "checkpoint_every": SAVED,
        "log_every": 1,
        "validate_every": None,
        "keep": 3,
    }
    settings = TrainSettings(output=str(output), steps=steps, **{**values, "tracker": "none", **changes})
    accelerator, model = make_accelerator(settings, precision), Model()

    def batches(start: int) -> Iterator[tuple[int, int, int]]:
        return ((number, accelerator.process_index, accelerator.num_processes) for number in range(start, 10**6))

    def measure() -> dict[str, float]:
        """By the main process alone, with whole averaged weights."""
        with torch.no_grad():
            return {"measured": float(Step(model)((1, 0, 1))[0])}

    rate = OptimiserSettings(**{"lr": 1e-2, "warmup_steps": 1, **(rate or {})})
    own = {"groups": model.branches, "measure": (SAVED, measure)}
    return Trainer(settings, rate, accelerator, Step(model), model, batches, **own)


def main(folder: Path) -> None:
    """All parts, in one start of the processes."""
    rank, outcomes = int(os.environ["RANK"]), {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            outcomes[name] = action()
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}"

    sharded = {"sharding": "fsdp2"}
    attempt("ddp", make_trainer(folder / "ddp").run)
    attempt("sharded", make_trainer(folder / "sharded", **sharded).run)
    attempt("waiting", make_trainer(folder / "waiting", background_saves=False, **sharded).run)
    attempt("first half", make_trainer(folder / "halves", SAVED, **sharded).run)
    attempt("second half", make_trainer(folder / "halves", **sharded).run)
    attempt("from one", make_trainer(folder / "from-one", **sharded).run)  # begun by a process alone
    for name in ("SGD", "NAdam"):
        rate = {"name": name, "options": {"momentum": 0.9} if name == "SGD" else {}}
        attempt(name, make_trainer(folder / name, rate=rate, **sharded).run)
    parts = make_trainer(folder / "parts", **sharded).state
    outcomes["numbers"] = [sum(one.to_local().numel() for one in parts.parameters.values())]
    outcomes["numbers"] += [sum(one.numel() for one in parts.parameters.values())]
    attempt("Adafactor", lambda: make_trainer(folder / "refused", rate={"name": "Adafactor"}, **sharded))
    attempt("elsewhere", lambda: make_trainer(folder / f"own-{rank}", **sharded))

    described = sharded_checkpoint.describe_file

    def fail(path: Path) -> Any:
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return described(path)

    failing = make_trainer(folder / "full", 3 * SAVED, **sharded)
    step = failing.state.step

    def full_after(*arguments: Any) -> None:
        step(*arguments)
        sharded_checkpoint.describe_file = fail if failing.state.done > SAVED + 1 else described

    failing.state.step = full_after
    attempt("full", failing.run)
    sharded_checkpoint.describe_file = described
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # DTensor's caches hold the process group, whose threads may abort an interpreter that ends
