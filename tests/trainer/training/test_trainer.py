"""Whole runs of six steps: resumed, killed, at other numbers of workers, and when things go wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from support.small_training import (
    ROOT,
    largest_difference,
    make_config,
    make_models,
    make_photos,
    moved,
    train_in_process_of_its_own,
    weights,
)

from trainer import train
from trainer.errors import TrainerError
from trainer.training import state
from trainer.training import step as training_step
from trainer.training import trainer as loop
from trainer.training.checkpoint import run_lock
from trainer.training.metrics import TrainingDiverged
from trainer.training.optimiser import learning_rate

FILES = ("trainables", "optimiser", "ema")
#: Keeps AdamW, which divides a gradient by its own size, from blowing the rounding of the smallest ones up.
ROUNDING_EPS = 1e-4
pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("loop")
    return make_models(root / "models"), make_photos(root / "photos")


@pytest.fixture(scope="module")
def uninterrupted(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    result = train_in_process_of_its_own(make_config(*files, output))
    assert result.returncode == 0, result.stderr
    return output


def same(one, other, step=6, files=FILES, tolerance=0.0):
    for name in files:
        assert largest_difference(weights(one, step, name), weights(other, step, name)) <= tolerance, name


def test_run_trains_and_reports(files, tmp_path):
    assert train.train(make_config(*files, tmp_path, train__keep=9)) is True
    assert moved(weights(tmp_path, 2), weights(tmp_path, 6))
    assert weights(tmp_path, 6)["branches.0.zero_linear.weight"].abs().max() > 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0]["learning rate"] == pytest.approx(1e-3 * 2 / 3)
    names = set().union(*lines)
    assert {"loss", "loss by kind/regularised", "mask area", "gradient norm", "samples per second"} <= names
    assert "loss by timestep/0250 to 0499" in names
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(0.02 < line["mask area"] < 0.5 for line in lines)


def test_stopped_and_resumed_is_bit_identical(files, tmp_path, uninterrupted, monkeypatch):
    config = make_config(*files, tmp_path)
    forward = loop.Trainer._forward_backward

    def ask(self, batch):
        if self.state.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    monkeypatch.setattr(loop.Trainer, "_forward_backward", ask)
    assert train.train(config) is False
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[-1] == "checkpoint-00000003"
    monkeypatch.undo()
    assert train.train(config) is True
    same(tmp_path, uninterrupted)


KILL_BEFORE_RENAME = """
import os, signal
from trainer.training import checkpoint
rename = os.rename
def kill(a, b):
    if "00000004" in str(b):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
checkpoint.os.rename = kill
"""
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


def test_killed_while_writing_and_while_training(files, tmp_path, uninterrupted):
    config = make_config(*files, tmp_path)
    first = train_in_process_of_its_own(config, KILL_BEFORE_RENAME)
    assert first.returncode == -signal.SIGKILL
    assert (tmp_path / "latest").read_text() == "checkpoint-00000002\n"
    assert list(tmp_path.glob(".writing-*")), "it was killed in the middle of writing"
    second = train_in_process_of_its_own(config, KILL_AFTER_FIVE_STEPS)
    assert second.returncode == -signal.SIGKILL and "going on from" in second.stderr
    assert (tmp_path / "latest").read_text() == "checkpoint-00000004\n"
    third = train_in_process_of_its_own(config)
    assert third.returncode == 0, third.stderr
    same(tmp_path, uninterrupted)
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_do_not_matter(files, tmp_path, uninterrupted, workers):
    train.train(make_config(*files, tmp_path, data__workers=workers))
    same(tmp_path, uninterrupted)


def test_accumulation_is_the_same_step(files, tmp_path):
    for parts in (1, 2):
        changes = {"optimiser__accumulation": parts, "optimiser__eps": ROUNDING_EPS}
        train.train(make_config(*files, tmp_path / str(parts), **changes))
    assert moved(weights(tmp_path / "1", 2), weights(tmp_path / "1", 6))
    same(tmp_path / "1", tmp_path / "2", files=("trainables",), tolerance=1e-5)


def test_other_seed_is_another_run(files, tmp_path, uninterrupted):
    train.train(make_config(*files, tmp_path, train__seed=4))
    assert largest_difference(weights(tmp_path, 6), weights(uninterrupted, 6)) > 1e-3


def test_sigusr1_from_outside_writes_a_checkpoint(files, tmp_path):
    config = make_config(*files, tmp_path, train__steps=100_000, train__checkpoint_every=100_000)
    code = (
        "import sys; from trainer import train; from trainer.config import Config; "
        "train.parse = lambda _: Config.from_json(sys.argv[1]); sys.exit(train.main())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, config.to_json()], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "log.jsonl").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def test_loss_that_is_no_number_stops_with_step_and_samples(files, tmp_path, monkeypatch):
    encode = training_step.encode_batch

    def poison(batch, base, encoder):
        features = encode(batch, base, encoder)
        if trained["steps"] == 3:
            features.latents[1] = float("nan")
            trained["id"] = batch.ids[1]
        trained["steps"] += 1
        return features

    trained = {"steps": 0}
    monkeypatch.setattr(training_step, "encode_batch", poison)
    config = make_config(*files, tmp_path, loss__face_dropout=0.0)
    with pytest.raises(TrainingDiverged) as caught:
        train.train(config)
    message = str(caught.value)
    assert "the loss of step 4 is not a number" in message and f"for {trained['id']}." in message
    assert "checkpoint-00000002" in message
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-00000002"]
    assert all(value.isfinite().all() for value in weights(tmp_path, 2).values())


def test_weights_that_are_no_numbers_are_not_saved(files, tmp_path, monkeypatch):
    forward = loop.Trainer._forward_backward

    def poison(self, batch):
        stepped = forward(self, batch)
        with torch.no_grad():
            self.state.model.branches[0].zero_linear.weight[0, 0] = float("inf")
        return stepped

    monkeypatch.setattr(loop.Trainer, "_forward_backward", poison)
    with pytest.raises(TrainingDiverged, match="weights after step 1 are not numbers. Last good checkpoint: none"):
        train.train(make_config(*files, tmp_path, train__checkpoint_every=1))


def test_full_disk_stops_with_the_last_good_checkpoint(files, tmp_path, monkeypatch, capsys):
    from trainer.training import checkpoint

    config = make_config(*files, tmp_path)
    save, usage = checkpoint.save_checkpoint, shutil.disk_usage(tmp_path)

    def fill(output, tensors, state, keep):
        if state["step"] == 4:
            monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        return save(output, tensors, state, keep)

    monkeypatch.setattr(state, "save_checkpoint", fill)
    monkeypatch.setattr(train, "parse", lambda _: config)
    assert train.main() == 1
    told = capsys.readouterr().err
    assert "checkpoint-00000004: the disk is full" in told and "Last good checkpoint: checkpoint-00000002" in told
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000002"]


def test_without_clipping_the_norm_is_still_told(files, tmp_path):
    train.train(make_config(*files, tmp_path, train__steps=2, optimiser__clip=None))
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["gradient norm"] > 0


def test_two_runs_in_one_folder(files, tmp_path):
    with run_lock(tmp_path), pytest.raises(TrainerError, match="is in use by process"):
        train.train(make_config(*files, tmp_path))


def test_checkpoint_of_another_base_or_adapter_is_refused(files, tmp_path):
    models, manifest = files
    other = make_models(tmp_path / "other")
    from tools.tiny_diffusers import make_base

    make_base(other / "base", seed=9)
    output = tmp_path / "run"
    train.train(make_config(models, manifest, output, train__steps=2))
    with pytest.raises(TrainerError, match="was trained on another base"):
        train.train(make_config(other, manifest, output))
    with pytest.raises(TrainerError, match="an adapter with tap = input, these settings make output"):
        train.train(make_config(models, manifest, output, adapter__tap="output"))
    with pytest.raises(TrainerError, match="train.resume is false"):
        train.train(make_config(models, manifest, output, train__resume=False))


def test_changed_settings_are_warned_about(files, tmp_path, caplog):
    train.train(make_config(*files, tmp_path, train__steps=2))
    train.train(make_config(*files, tmp_path, train__steps=4, optimiser__lr=5e-4, data__workers=0))
    assert "optimiser.lr 0.001 → 0.0005" in caplog.text
    assert "train.steps" not in caplog.text


def test_batch_that_does_not_divide(files, tmp_path):
    config = make_config(*files, tmp_path).model_copy(update={"train": make_config(*files, tmp_path).train})
    config = config.model_copy(update={"optimiser": config.optimiser.model_copy(update={"accumulation": 3})})
    with pytest.raises(TrainerError, match=r"train\.batch_size is 4, which does not divide by 1 process\(es\) × 3"):
        train.train(config)


def test_pictures_tracker_and_start_from_an_adapter(files, tmp_path):
    from trainer.export import export

    first = tmp_path / "first"
    changes = {"train__validate_every": 4, "train__tracker": "tensorboard", "validation__steps": 2}
    train.train(make_config(*files, first, train__steps=4, validation__prompts=["a face"], **changes))
    grid = Image.open(first / "validation" / "step-00000004.png")
    assert grid.size == (3 * 68 + 4, 2 * 68 + 4 + 16)
    without, with_face = (grid.crop((4 + 68 * place, 20, 68 * (place + 1), 84)) for place in (1, 2))
    assert without.tobytes() != with_face.tobytes()
    assert list(first.glob("logs/tensorboard/events*"))
    adapter = export(first, weights="raw", precision="fp32")
    second = tmp_path / "second"
    train.train(make_config(*files, second, train__steps=1, adapter__init=str(adapter), optimiser__lr=1e-12))
    assert largest_difference(weights(first, 4), weights(second, 1)) < 1e-6
    with pytest.raises(TrainerError, match="adapter.init: .* differs in self_attention"):
        train.train(make_config(*files, tmp_path / "third", adapter__init=str(adapter), adapter__self_attention=False))


def test_command_line(files, tmp_path, capsys):
    missing = ["--config", str(tmp_path / "none.yaml")]
    assert train.main(missing) == 1
    assert "cannot read the configuration" in capsys.readouterr().err
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(make_config(*files, tmp_path / "run").model_dump(mode="json")))
    assert train.main([str(config), "train.stpes=1"]) == 1
    assert "did you mean train.steps?" in capsys.readouterr().err
    assert train.main([str(config), "train.steps=1", "data.manifest=nowhere.jsonl"]) == 1
    assert "nowhere.jsonl: no such file" in capsys.readouterr().err
    assert train.main([str(config), "train.steps=1"]) == 0
    assert (tmp_path / "run" / "checkpoint-00000001").is_dir()


@pytest.mark.parametrize("family, prediction", [("sd2", "v"), ("sdxl", "epsilon")])
def test_other_families_with_and_without_a_cache(files, tmp_path, family, prediction):
    from trainer.cache import make_cache

    models = make_models(tmp_path / "models", family)
    changes = {"train__steps": 2, "optimiser__warmup_steps": 0, "data__flip": False, "optimiser__eps": ROUNDING_EPS}
    cached = make_config(models, files[1], tmp_path / "cached", data__cache=str(tmp_path / "cache"), **changes)
    make_cache(cached, progress=False)
    assert train.train(cached) and train.train(make_config(models, files[1], tmp_path / "plain", **changes))
    one, other = weights(tmp_path / "cached", 2), weights(tmp_path / "plain", 2)
    assert one["branches.0.zero_linear.weight"].abs().max() > 1e-3
    assert largest_difference(one, other) < 1e-4
    state = json.loads((tmp_path / "cached" / "checkpoint-00000002" / "state.json").read_text())
    assert json.loads(state["adapter"])["prediction"] == prediction


def test_learning_rate_counts_optimiser_steps(files, tmp_path):
    settings = make_config(*files, tmp_path, optimiser__warmup_steps=4, optimiser__schedule="cosine").optimiser
    rates = [learning_rate(step, 12, settings) for step in range(13)]
    assert rates[:4] == pytest.approx([0.0002, 0.0004, 0.0006, 0.0008])
    assert rates[4] == pytest.approx(0.001) and rates[8] == pytest.approx(0.0005)
    assert rates[12] == pytest.approx(0.0, abs=1e-12)


def test_plain_attention_is_on_during_training_and_not_after(files, tmp_path, monkeypatch):
    used = []
    forward = training_step.AdapterStep.forward

    def watched(self, *inputs):
        used.append(torch.backends.cuda.flash_sdp_enabled())
        return forward(self, *inputs)

    monkeypatch.setattr(training_step.AdapterStep, "forward", watched)
    for attention in ("fused", "plain"):
        config = make_config(*files, tmp_path / attention, model__attention=attention, train__steps=1)
        train.train(config)
    assert used == [True, False] and torch.backends.cuda.flash_sdp_enabled()
