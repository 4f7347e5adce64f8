"""What a run notices when it goes on: other data, other steps, and what it logged before it was killed."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from support.small_training import make_config, make_models, make_photos, train_in_process_of_its_own

from trainer import train

KILL_AFTER_FIVE_STEPS = """
import os, signal
from trainer.training import trainer as loop
forward = loop.Trainer._forward_backward
def kill(self, batch):
    if self.state.done == 5:
        self.state.end()  # the checkpoint of step 4 is written by a thread
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, batch)
loop.Trainer._forward_backward = kill
"""


@pytest.fixture(autouse=True)
def alone():
    """One thread, as in the process of its own, and no state of an earlier run."""
    threads = torch.get_num_threads()
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    return make_models(root / "models"), make_photos(root / "photos")


def test_changed_data_set_is_warned_about(files, tmp_path, caplog):
    models, manifest = files
    copy = tmp_path / "photos" / manifest.name
    shutil.copytree(manifest.parent, copy.parent)
    output = tmp_path / "run"
    train.train(make_config(models, copy, output, train__steps=1))
    train.train(make_config(models, copy, output, train__steps=2))
    assert "going on with other settings" not in caplog.text
    rows = [json.loads(line) for line in copy.read_text().splitlines()]
    rows[3]["caption"] = "another"
    copy.write_text("\n".join(json.dumps(row) for row in rows))
    train.train(make_config(models, copy, output, train__steps=3))
    assert "the records of the data set (12 photos, now 12; their captions, boxes, people or order)" in caplog.text
    copy.write_text("\n".join(json.dumps(row) for row in rows[:-1]))
    train.train(make_config(models, copy, output, train__steps=4))
    assert "the records of the data set (12 photos, now 11;" in caplog.text


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_changed_number_of_steps_is_warned_about_where_it_matters(files, tmp_path, caplog, schedule):
    for steps in (2, 4):
        train.train(make_config(*files, tmp_path, train__steps=steps, optimiser__schedule=schedule))
    assert ("train.steps 2 → 4" in caplog.text) == (schedule != "constant")


def test_log_repeats_nothing_after_a_kill(files, tmp_path):
    config = make_config(*files, tmp_path, train__log_every=1)
    killed = train_in_process_of_its_own(config, KILL_AFTER_FIVE_STEPS)
    assert killed.returncode == -signal.SIGKILL
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # the kill fell into a line
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[:-1]]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5]  # the last checkpoint is that of step 4
    train.train(config)
    again = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in again] == [1, 2, 3, 4, 5, 6]
    for line in (*logged, *again):
        line.pop("samples per second")
    assert again[:5] == logged


def test_log_of_a_run_without_a_checkpoint_starts_anew(files, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    train.train(make_config(*files, tmp_path, train__steps=2))
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [2]
