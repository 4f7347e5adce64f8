"""What a run will cost, against the run itself; and that nothing has to be there for it."""

from __future__ import annotations

import json

import pytest
import torch
from support.small_training import make_config, make_models, make_photos

from tools.tiny_diffusers import TinySize
from trainer import train
from trainer.config import Config
from trainer.errors import TrainerError
from trainer.models.adapter import load_models
from trainer.training.plan import GPUS, LiveMemory, estimate
from trainer.training.step import AdapterStep, Plan, encode_batch


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("plan-photos"))


def config_of(models, manifest, tmp_path, **changes) -> Config:
    return make_config(models, manifest, tmp_path / "run", data__references=1, **changes)


@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", False), ("bf16", False), ("fp32", True)])
def test_what_is_alive_is_what_a_real_step_holds(models, manifest, tmp_path, precision, checkpointing):
    changes = {"model__precision": precision, "model__gradient_checkpointing": checkpointing}
    config = config_of(models, manifest, tmp_path, loss__face_dropout=0.0, **changes)
    found = estimate(config)
    real = load_models(config, "cpu")
    from trainer.data.dataset import FaceDataset, TensorShapes, collate
    from trainer.data.manifest import read_manifest

    dataset = FaceDataset(read_manifest(manifest)[0], config, TensorShapes.of(real.frozen, 64))
    batch = collate([dataset[index, 0] for index in range(4)])
    step, features = AdapterStep(real, config.loss), encode_batch(batch, real.frozen, real.encoder)
    plan = Plan.of([False] * 4, [False] * 4, "regularised", "off")
    weights = [*real.frozen.host.state_dict().values(), *real.adapter.state_dict().values()]
    memory = LiveMemory(weights)
    with memory:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, *_ = step.loss(batch, features, plan)
        loss.backward()
    assert found.passes == pytest.approx(memory.peak, rel=0.25 if checkpointing else 0.02)
    assert found.host + found.adapter == sum(one.nbytes for one in weights)
    assert found.trained == sum(one.numel() for one in real.adapter.parameters())


def test_checkpointing_takes_less_memory_and_more_operations(models, manifest, tmp_path):
    plain, less = (
        estimate(config_of(models, manifest, tmp_path, model__gradient_checkpointing=way)) for way in (False, True)
    )
    assert less.passes < 0.8 * plain.passes and less.operations > 1.1 * plain.operations


@pytest.mark.slow
def test_it_follows_the_settings(models, manifest, tmp_path):
    def found(processes=1, **changes):
        return estimate(config_of(models, manifest, tmp_path, **changes), processes)

    one = found()
    assert one.optimiser == 8 * one.trained and one.average == 4 * one.trained and one.samples == (4, 24)
    half = found(2, train__ema=None, loss__face_dropout=0.5, optimiser__name="SGD")
    assert half.samples == (2, 24) and half.passes < one.passes
    assert half.average == half.optimiser == 0
    parts, whole = found(4, train__sharding="fsdp2"), found(4)
    assert parts.optimiser == 2 * one.trained and parts.average == one.trained and whole.average == 4 * one.trained
    assert parts.adapter == pytest.approx(1.5 * whole.adapter, rel=0.01) and parts.memory < whole.memory
    assert half.operations == pytest.approx(one.operations / 0.9 * 0.5)
    assert found(loss__kind="mask").operations < found(loss__standard_probability=0.5).operations < one.operations
    assert one.hours(GPUS["T4"], "fp32") > one.hours(GPUS["T4"], "bf16") > one.hours(GPUS["H100 SXM"], "bf16") > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families(tmp_path, manifest, family):
    made = make_models(tmp_path, family, TinySize(channels=(32, 64, 64) if family == "sdxl" else (32, 64)))
    assert estimate(config_of(made, manifest, tmp_path)).operations > 0


def test_command_starts_nothing(models, manifest, tmp_path, capsys):
    config = config_of(models, manifest, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert train.main([str(path), "--plan"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    values = json.loads(last)
    assert values["memory"] > 0 and set(values["hours"]) == set(GPUS)
    assert any("GB for 12" in line for line in text) and any("encoders" in line for line in text)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_is_missing_is_taken_from_the_published_models(tmp_path, capsys):
    names = ["model.base=none", "adapter.encoder.path=none", "data.manifest=none", f"train.output={tmp_path / 'run'}"]
    with pytest.raises(TrainerError, match="model.base: none is not there.*set model.family to one of sd1, sd2, sdxl"):
        estimate(Config.load(None, names))
    config = Config.load(None, [*names, "data.resolution=64", "train.batch_size=1", "model.family=sd1"])
    found = estimate(config)
    assert found.host == 2 * 859_520_964 and found.trained > 2e8  # the published U-Net
    assert any("published U-Net of sd1" in text for text in found.assumed) and any(
        "B/32" in text for text in found.assumed
    )


@pytest.mark.slow
def test_published_unidiffuser(tmp_path):
    config = Config.load("trainer/configs/paper.yaml", ["train.batch_size=1"])
    found = estimate(config)
    assert 680e6 < found.trained < 710e6 and 9e12 < found.operations < 13e12
