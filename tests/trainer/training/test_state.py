"""The trainer with a module that has nothing to do with faces: optimisers, partly frozen weights, moving average."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.config import OptimiserSettings, TrainSettings
from trainer.errors import TrainerError
from trainer.training import state
from trainer.training.checkpoint import CheckpointError, load_checkpoint, load_latest
from trainer.training.metrics import Record
from trainer.training.processes import make_accelerator
from trainer.training.stopping import StopRequest
from trainer.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("alone")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 8).requires_grad_(False)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Conv1d(1, 1, 8)
        self.register_buffer("scale", torch.tensor(2.0))


class Step(nn.Module):
    """Draws its samples from the number that is its batch."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, number: int) -> tuple[torch.Tensor, Record]:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
        y = self.model.head(self.model.hidden(self.model.frozen(x)).relu()[:, None]).flatten()
        losses = (y.float() * self.model.scale - x.sum(1)).square()
        values = {"absolute": (y - x.sum(1)).detach().abs()}
        return losses.mean(), Record(6, losses.detach(), values=values)


def make_trainer(
    output: Path, steps: int = 8, precision: str = "fp32", two: bool = False, stop=None, rate=None, **changes
):
    values = {"batch_size": 6, "ema": 0.9, "checkpoint_every": 4, "log_every": 4, "validate_every": None}
    settings = TrainSettings(output=str(output), steps=steps, **{**values, "tracker": "none", **changes})
    model = Model()
    optimisers = None
    if two:
        optimisers = [torch.optim.SGD(model.hidden.parameters(), lr=1.0, momentum=0.9)]
        optimisers.append(torch.optim.AdamW(model.head.parameters(), lr=1.0, fused=True))
    accelerator = make_accelerator(settings, precision)
    rate = OptimiserSettings(**{"lr": 1e-2, "warmup_steps": 1, **(rate or {})})
    batches = lambda start: iter(range(start, 10**6))  # noqa: E731
    return Trainer(settings, rate, accelerator, Step(model), model, batches, optimisers=optimisers, stop=stop)


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": t for name, group in load_latest(output).tensors.items() for key, t in group.items()}


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_is_bit_identical(tmp_path, two, precision):
    options = {"two": two, "precision": precision}
    assert make_trainer(tmp_path / "whole", **options).run()
    assert make_trainer(tmp_path / "parts", steps=4, **options).run()
    resumed = make_trainer(tmp_path / "parts", **options)
    assert resumed.state.done == 4 and resumed.run()
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert (
        whole.keys() == parts.keys()
        and {"trainables.frozen.weight", "trainables.scale", "ema.head.bias"} <= whole.keys()
    )
    assert not any(name.startswith(("ema.frozen", "ema.scale")) for name in whole)
    assert ("optimiser.momentum_buffer.hidden.bias" in whole) == two
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert torch.equal(whole["trainables.frozen.weight"], Model().frozen.weight)
    assert not torch.equal(whole["trainables.hidden.weight"], Model().hidden.weight)


OPTIMISERS = [
    ("adamw", {"amsgrad": True}, "torch"),
    ("NAdam", {}, "torch"),
    ("torch.optim.Adafactor", {}, "torch"),
    ("SGD", {"momentum": 0.9}, "torch"),
    ("prodigy", {"d_coef": 2.0, "d0": 1e-4}, "prodigyopt"),
    ("adamw8bit", {"min_8bit_size": 16}, "bitsandbytes"),
]


@pytest.mark.parametrize(("name", "options", "package"), OPTIMISERS, ids=[name for name, *_ in OPTIMISERS])
def test_resumed_is_bit_identical_with_any_optimiser(tmp_path, name, options, package):
    pytest.importorskip(package)
    rate = {"name": name, "options": options, "fused": False, "lr": 1.0 if name == "prodigy" else 1e-2}
    make_trainer(tmp_path / "whole", rate=rate).run()
    make_trainer(tmp_path / "parts", steps=4, rate=rate).run()
    resumed = make_trainer(tmp_path / "parts", rate=rate)
    assert resumed.state.done == 4 and resumed.run()
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert not torch.equal(whole["trainables.hidden.weight"], Model().hidden.weight)
    (kept,) = load_latest(tmp_path / "whole").state["optimisers"]
    assert name != "prodigy" or kept["groups"][0]["d"] > 1e-4  # what it has found out is no tensor


def test_another_optimiser_starts_without_what_the_first_has_gathered(tmp_path, caplog):
    make_trainer(tmp_path, steps=2).run()
    trainer = make_trainer(tmp_path, steps=4, rate={"name": "SGD"})
    assert "was made with the optimiser AdamW; SGD starts without" in caplog.text
    assert trainer.state.done == 2 and trainer.run()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    write, further = state.save_checkpoint, threading.Event()

    def slowly(output, files, values, keep):
        assert values["step"] == 8 or further.wait(60), "training waited for the file"
        return write(output, files, values, keep)

    monkeypatch.setattr(state, "save_checkpoint", slowly)
    trainer = make_trainer(tmp_path / "background", keep=3)
    step = trainer.state.step
    trainer.state.step = lambda *arguments: (step(*arguments), further.set() if trainer.state.done == 6 else None)
    assert trainer.run()
    monkeypatch.undo()
    make_trainer(tmp_path / "waiting", keep=3, background_saves=False).run()
    for number in (4, 8):  # of the step it is named after, though the weights had moved on
        one, other = (
            load_checkpoint(tmp_path / name / f"checkpoint-{number:08d}") for name in ("background", "waiting")
        )
        assert one.state == other.state
        for name, group in other.tensors.items():
            assert all(torch.equal(value, one.tensors[name][key]) for key, value in group.items())


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    write = state.save_checkpoint

    def fail(output, files, values, keep):
        if values["step"] == 8:
            raise CheckpointError("the disk is full")
        return write(output, files, values, keep)

    monkeypatch.setattr(state, "save_checkpoint", fail)
    trainer = make_trainer(tmp_path, steps=20)
    with pytest.raises(CheckpointError, match="the disk is full"):
        trainer.run()
    assert 8 < trainer.state.done <= 12 and load_latest(tmp_path).step == 4


def test_it_learns_and_reports(tmp_path):
    make_trainer(tmp_path, steps=40).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(4, 41, 4))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and lines[-1]["absolute"] < lines[0]["absolute"]


def test_moving_average(tmp_path):
    """d = min(0.9, (1 + step) / (10 + step)) from the second step on; the first takes the weights as they are."""
    seen, expected = [], None
    trainer = make_trainer(tmp_path, steps=5, checkpoint_every=100)
    step = trainer.state.step

    def watched(*arguments):
        step(*arguments)
        seen.append(trainer.state.model.head.bias.detach().clone())

    trainer.state.step = watched
    trainer.run()
    for number, value in enumerate(seen):
        decay = min(0.9, (1 + number) / (10 + number)) if number else 0.0
        expected = value if expected is None else decay * expected + (1 - decay) * value
    checkpoint = load_latest(tmp_path)
    assert torch.allclose(checkpoint.weights()["head.bias"], expected, atol=1e-6)
    assert torch.equal(checkpoint.weights("raw")["head.bias"], seen[-1])
    with trainer.state.averaged():
        assert torch.equal(trainer.state.model.head.bias, checkpoint.weights("ema")["head.bias"])
    assert torch.equal(trainer.state.model.head.bias, seen[-1])


def test_a_budget_of_time_ends_the_run(tmp_path):
    with StopRequest() as stop:
        trainer = make_trainer(tmp_path, steps=100, stop=stop)
        step = trainer.state.step
        trainer.state.step = lambda *arguments: (step(*arguments), setattr(stop, "requested", trainer.state.done == 7))
        assert trainer.run() is False
    assert load_latest(tmp_path).step == 7


def test_a_checkpoint_of_another_module_is_refused(tmp_path, monkeypatch):
    make_trainer(tmp_path, steps=1).run()
    before = Model.__init__

    def wider(self):
        before(self)
        self.hidden = nn.Linear(8, 9)

    monkeypatch.setattr(Model, "__init__", wider)
    with pytest.raises(
        TrainerError, match=r"(?s)checkpoint-00000001 is of another model than this run trains.*hidden\.weight"
    ):
        make_trainer(tmp_path)
