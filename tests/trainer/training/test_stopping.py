"""Asked to stop: under each launcher, within a long step, while pictures are made; and an exception."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from support.launching import SLOWLY, Run, command, write_run
from support.small_training import largest_difference, make_config, make_models, make_photos, weights

from trainer import train
from trainer.training import processes, state, step, stopping
from trainer.training import trainer as loop
from trainer.training.checkpoint import list_checkpoints
from trainer.training.stopping import StopRequest, find_launcher
from trainer.training.validation import Validation

FILES = ("trainables", "optimiser", "ema")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("stopping")
    return make_models(root / "models"), make_photos(root / "photos")


def names(output):
    return [path.name for path in list_checkpoints(output)]


# --- launchers -------------------------------------------------------------------------------------------

ENDLESS = {"train__steps": 100_000, "train__checkpoint_every": 100_000, "data__workers": 1}


def slow_case(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "launcher, count, number",
    [
        ("accelerate", 1, signal.SIGTERM),
        slow_case("accelerate", 2, signal.SIGUSR1),
        slow_case("torchrun", 1, signal.SIGUSR1),
        ("torchrun", 2, signal.SIGTERM),
        slow_case("accelerate", 1, signal.SIGUSR1),
        slow_case("accelerate", 2, signal.SIGTERM),
        slow_case("torchrun", 1, signal.SIGTERM),
        slow_case("torchrun", 2, signal.SIGUSR1),
        slow_case("torchrun", 2, signal.SIGINT),
        slow_case("python", 1, signal.SIGINT),
    ],
)
def test_a_signal_to_the_launcher_stops_with_a_checkpoint(files, tmp_path, launcher, count, number):
    """Nothing of it is left running, and nothing was killed while it saved."""
    run = write_run(make_config(*files, tmp_path / "run", **ENDLESS), tmp_path, SLOWLY.format(seconds=0.2))
    with Run([*command(launcher, count), *run], tmp_path / "output.txt") as started:
        started.wait_until((tmp_path / "run/log.jsonl").exists)
        started.send(number)
        began = time.monotonic()
        started.wait(25)
        assert len(names(tmp_path / "run")) == 1, started.output
        assert time.monotonic() - began < 20
    assert "Traceback" not in started.output.replace("SignalException", "").split("stopped at step")[0]
    assert "stopped at step" in started.output


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(files, tmp_path):
    """To the one that is not the main process, with its loader workers, as a scheduler does it."""
    run = write_run(make_config(*files, tmp_path / "run", **ENDLESS), tmp_path, SLOWLY.format(seconds=0.2))
    with Run([*command("torchrun", 2), *run], tmp_path / "output.txt") as started:
        started.wait_until((tmp_path / "run/log.jsonl").exists)
        other = started.below(lambda one: one.environ().get("RANK") == "1")
        assert len(other) >= 2, "a training process and its loader worker"
        for process in other:
            process.send_signal(signal.SIGUSR1)
        assert started.wait(25) == 0, started.output
    assert len(names(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_launcher_that_dies_early_takes_the_run_with_it(files, tmp_path):
    """While the process still imports its libraries, it has nothing to save and simply ends."""
    run = write_run(make_config(*files, tmp_path / "run", **ENDLESS), tmp_path)
    with Run([*command("accelerate", 1), *run], tmp_path / "output.txt") as started:
        started.wait_until(lambda: started.below(lambda one: run[0] in one.cmdline()))
        time.sleep(0.5)
        started.send(signal.SIGTERM)
        started.wait(30)
    assert not names(tmp_path / "run")


def test_a_shell_is_no_launcher():
    """It may end (a closed terminal, ``nohup … &``), and the run goes on."""
    sleep = "import time; time.sleep(60)"
    lines = {
        "shell": ["sh", "-c", "sleep 60; true # accelerate launch"],
        "torchrun": [sys.executable, "-c", sleep, "/somewhere/bin/torchrun"],
        "module": [sys.executable, "-c", sleep, "-m", "accelerate.commands.launch"],
    }
    started = {name: subprocess.Popen(line, start_new_session=True) for name, line in lines.items()}
    try:
        # Linux shows an empty command line for a moment after a program was started.
        until = time.monotonic() + 10
        while not all(psutil.Process(process.pid).cmdline() for process in started.values()):
            assert time.monotonic() < until
            time.sleep(0.01)
        found = {name: find_launcher(process.pid) for name, process in started.items()}
    finally:
        for process in started.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert found == {"shell": None, "torchrun": started["torchrun"].pid, "module": started["module"].pid}
    assert find_launcher(started["torchrun"].pid) is None, "it has ended"


# --- when it is noticed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.004, 0.07, 0.3, 0.9, 6.0])
def test_processes_ask_one_another_about_once_a_second(monkeypatch, seconds):
    """Whatever a pass takes: never more than a second apart, and never more often than before each pass."""
    clock, asked = [0.0], []
    accelerator = SimpleNamespace(num_processes=2, is_main_process=True, device="cpu")
    accelerator.reduce = lambda tensor, how: asked.append(clock[0]) or tensor
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    vote = processes.StopVote(accelerator, lambda: clock[0] > 30.0)
    while not vote():
        clock[0] += seconds
    assert 30.0 < clock[0] <= 30.0 + max(1.0, seconds) + seconds
    gaps = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
    assert max(gaps) <= max(1.0, seconds) + 1e-6
    assert min(gaps[10:] or gaps) >= min(0.5, 10 * seconds) - 1e-6, "once the pace is known"


@pytest.mark.usefixtures("alone")
def test_stopped_amid_a_step_is_bit_identical(files, tmp_path, monkeypatch):
    """A step of several passes is not waited for, and starts anew when the run goes on."""
    changes = {"optimiser__accumulation": 4, "loss__face_dropout": 0.0}
    assert train.train(make_config(*files, tmp_path / "whole", **changes))
    forward, passes = loop.Trainer._forward_backward, []

    def ask(self, batch):
        passes.append(self.state.done)
        if len(passes) == 14:  # the second pass of the fourth step
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    monkeypatch.setattr(loop.Trainer, "_forward_backward", ask)
    config = make_config(*files, tmp_path / "parts", train__checkpoint_every=100, **changes)
    assert train.train(config) is False
    assert len(passes) == 14 and names(tmp_path / "parts") == ["checkpoint-00000003"]
    monkeypatch.undo()
    assert train.train(config) is True
    for name in FILES:
        assert largest_difference(weights(tmp_path / "whole", 6, name), weights(tmp_path / "parts", 6, name)) == 0.0


@pytest.mark.usefixtures("alone")
def test_a_pass_that_takes_too_long_is_saved_beside(files, tmp_path, monkeypatch):
    """The launcher kills after 30 s: the steps done are on the disk before, though Python's handlers have to wait."""
    forward, found = loop.Trainer._forward_backward, []

    def long(self, batch):
        if self.state.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            while not found and time.monotonic() < deadline:  # each in one call that does not come back to Python
                hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)
                found.extend(names(tmp_path / "run"))
        return forward(self, batch)

    deadline = time.monotonic() + 60
    monkeypatch.setattr(stopping, "GRACE", 0.2)
    monkeypatch.setattr(loop.Trainer, "_forward_backward", long)
    config = make_config(*files, tmp_path / "run", train__checkpoint_every=100)
    assert train.train(config) is False
    assert found == ["checkpoint-00000003"]
    monkeypatch.undo()
    assert train.train(config) is True and train.train(make_config(*files, tmp_path / "whole"))
    for name in FILES:
        assert largest_difference(weights(tmp_path / "whole", 6, name), weights(tmp_path / "run", 6, name)) == 0.0


@pytest.mark.usefixtures("alone")
def test_a_signal_during_a_checkpoint_needs_no_second_one(files, tmp_path, monkeypatch):
    save, saved = state.save_checkpoint, []

    def ask(output, tensors, state, keep):
        os.kill(os.getpid(), signal.SIGTERM)
        saved.append(state["step"])
        return save(output, tensors, state, keep)

    monkeypatch.setattr(state, "save_checkpoint", ask)
    assert train.train(make_config(*files, tmp_path, train__background_saves=False)) is False
    assert saved == [2] and names(tmp_path) == ["checkpoint-00000002"]


@pytest.mark.usefixtures("alone")
def test_pictures_are_broken_off(files, tmp_path, monkeypatch):
    """They can take minutes."""
    go_on, asked = Validation._go_on, []

    def ask(self):
        asked.append(self)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        go_on(self)

    monkeypatch.setattr(Validation, "_go_on", ask)
    config = make_config(*files, tmp_path, train__validate_every=3, validation__steps=50)
    assert train.train(config) is False
    assert len(asked) == 3 and names(tmp_path)[0] == "checkpoint-00000003"
    assert not (tmp_path / "validation").exists()


@pytest.fixture
def handler():
    """Sets the handler of a signal for one test."""
    before = {}

    def change(number, how):
        before[number] = signal.signal(number, how)

    yield change
    for number, how in before.items():
        signal.signal(number, how)


@pytest.mark.usefixtures("alone")
def test_a_second_interrupt_means_it(handler):
    handler(signal.SIGINT, signal.default_int_handler)
    with StopRequest() as stop:
        stop.listen(lambda: None)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("torchrun", [False, True])
def test_an_ignored_signal_stays_ignored(handler, monkeypatch, torchrun):
    """``nohup`` ignores SIGHUP. The launcher of several processes does not, and its processes must not either."""
    handler(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopRequest() as stop:
        stop.listen(lambda: None)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested is torchrun
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


# --- exceptions ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_an_exception_saves_first(files, tmp_path, monkeypatch, caplog):
    forward, passes = step.AdapterStep.forward, []

    def fail(self, batch):
        passes.append(batch)
        if len(passes) == 4:
            raise OSError("image file is truncated")
        return forward(self, batch)

    monkeypatch.setattr(step.AdapterStep, "forward", fail)
    with pytest.raises(OSError, match="truncated"):
        train.train(make_config(*files, tmp_path, train__checkpoint_every=100))
    assert names(tmp_path) == ["checkpoint-00000003"]
    assert "an exception ends the run; last good checkpoint: " in caplog.text


@pytest.mark.usefixtures("alone")
def test_the_exception_is_shown_even_if_saving_fails(files, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(state, "save_checkpoint", fail)
    monkeypatch.setattr(loop.Trainer, "_log", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(make_config(*files, tmp_path))
    assert "nothing could be saved: CUDA error" in caplog.text and not names(tmp_path)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("damage, told", [("half a step", "was broken off"), ("no numbers", "are not numbers")])
def test_unsound_weights_are_not_saved(files, tmp_path, monkeypatch, caplog, damage, told):
    """An exception between the optimiser and the moving average, or with weights that are no numbers."""
    step = state.TrainingState.step

    def fail(self, *arguments):
        if self.done == 3 and damage == "half a step":
            self.average = object()  # has no step: an AttributeError
        step(self, *arguments)
        if self.done == 3 and damage == "no numbers":
            self.model.branches[0].zero_linear.weight.data[0, 0] = float("nan")
            raise AttributeError

    monkeypatch.setattr(state.TrainingState, "step", fail)
    with pytest.raises(AttributeError):
        train.train(make_config(*files, tmp_path))
    assert names(tmp_path) == ["checkpoint-00000002"]
    assert "nothing could be saved" in caplog.text and told in caplog.text


@pytest.mark.usefixtures("alone")
def test_pictures_that_fail_do_not_change_the_run(files, tmp_path, monkeypatch, caplog):
    """They fail with the moving average in the place of the weights."""

    def fail(self):
        raise RuntimeError("out of memory")

    assert train.train(make_config(*files, tmp_path / "whole"))
    monkeypatch.setattr(Validation, "_go_on", fail)
    assert train.train(make_config(*files, tmp_path / "run", train__validate_every=2))
    assert "(3 so far), training goes on: RuntimeError: out of memory" in caplog.text
    for name in FILES:
        assert largest_difference(weights(tmp_path / "whole", 6, name), weights(tmp_path / "run", 6, name)) == 0.0
