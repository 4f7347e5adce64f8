"""FSDP2: the same training as without it, with a part of everything in each process and checkpoints of all of them."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors import safe_open
from support.launching import SLOWLY, Run, command, launch, write_run
from support.sharded_training import SAVED, STEPS, make_trainer
from support.small_training import largest_difference, make_config, make_models, make_photos

from feedface_core.files.adapter_file import load_adapter
from trainer.config import TrainSettings
from trainer.errors import TrainerError
from trainer.export import export
from trainer.training import sharding
from trainer.training.checkpoint import list_checkpoints, load_checkpoint, load_latest

GROUPS = ("trainables", "optimiser", "ema")
pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of all runs of two processes, with what came of each part in both."""
    folder = tmp_path_factory.mktemp("sharding")
    make_trainer(folder / "alone").run()
    make_trainer(folder / "from-one", SAVED).run()
    line = [*command("torchrun", 2), "-m", "support.sharded_training", str(folder)]
    path = os.pathsep.join(["tests", "."])
    with Run(line, folder / "output.txt", PYTHONPATH=path) as run:
        assert run.wait(300) == 0, run.output[-6000:]
    return folder, [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in (0, 1)]


def differences(one, other):
    assert one.tensors.keys() == other.tensors.keys() == set(GROUPS)
    return {name: largest_difference(one.tensors[name], other.tensors[name]) for name in GROUPS}


@pytest.mark.parametrize("name", ["sharded", "waiting", "halves", "from-one"])
def test_the_same_as_one_process(ran, name):
    """Weights that do not divide, branches that only one process calls, resumed or not, of a checkpoint of either
    kind."""
    folder, outcomes = ran
    assert all(own[part] is True for own in outcomes for part in ("ddp", "sharded", "second half", "from one")), (
        outcomes
    )
    found = load_latest(folder / name)
    assert found.step == STEPS and found.sharded
    assert max(differences(found, load_latest(folder / "alone")).values()) < 2e-6
    assert largest_difference(found.tensors["trainables"], load_checkpoint_of(folder / "alone", SAVED)) > 1e-3
    lines = {
        run: [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]
        for run in ("alone", name)
    }
    for one, other in zip(lines["alone"][-STEPS:], lines[name][-STEPS:], strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        for key in one.keys() - {"samples per second"}:
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
    assert "measured" in lines[name][-1]


def load_checkpoint_of(output, step):
    return load_checkpoint(output / f"checkpoint-{step:08d}").tensors["trainables"]


def test_resumed_and_written_meanwhile_is_bit_identical(ran):
    folder, _ = ran
    for step in (SAVED, STEPS):
        kept = [load_checkpoint(folder / name / f"checkpoint-{step:08d}") for name in ("sharded", "waiting", "halves")]
        for other in kept[1:]:
            assert max(differences(kept[0], other).values()) == 0.0
            assert kept[0].state == other.state


def test_each_process_holds_and_writes_a_part(ran):
    folder, outcomes = ran
    (first, whole), (second, _) = (own["numbers"] for own in outcomes)
    assert first + second == whole and 0.3 < second / whole < 0.5
    path = load_latest(folder / "sharded").path
    files = sorted(path.glob("shard-*"))
    assert len(files) == 2 and not list(path.glob("*.pt")) and not (path / ".metadata").exists()
    sizes = []
    for file in files:
        with safe_open(file, "pt") as opened:
            sizes.append(sum(opened.get_tensor(name).numel() for name in opened.keys() if "branches.0" in name))  # noqa: SIM118
    assert sizes[0] == pytest.approx(sizes[1], rel=0.6)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {"state.json", *(file.name for file in files)}


def test_goes_on_in_one_process(ran, tmp_path):
    """Of two processes to one, sharded or not; the checkpoints it writes are those of any run."""
    folder, _ = ran
    for name, changes in {"plain": {}, "sharded": {"sharding": "fsdp2"}}.items():
        shutil.copytree(folder / "sharded", tmp_path / name)
        shutil.rmtree(tmp_path / name / f"checkpoint-{STEPS:08d}")
        trainer = make_trainer(tmp_path / name, **changes)
        assert trainer.state.done == SAVED and trainer.run()
        found = load_latest(tmp_path / name)
        assert not found.sharded and max(differences(found, load_latest(folder / "alone")).values()) < 2e-6


@pytest.mark.parametrize("name", ["SGD", "NAdam"])
def test_other_optimisers(ran, tmp_path, name):
    folder, outcomes = ran
    assert [own[name] for own in outcomes] == [True, True]
    make_trainer(tmp_path, rate={"name": name, "options": {"momentum": 0.9} if name == "SGD" else {}}).run()
    assert max(differences(load_latest(folder / name), load_latest(tmp_path)).values()) < 1e-5


def test_refused_by_name(ran, tmp_path, monkeypatch):
    _, outcomes = ran
    for own in outcomes:
        assert own["Adafactor"].startswith(
            "TrainerError: train.sharding=fsdp2 does not go with the optimiser Adafactor"
        )
        assert "has another train.output than the one that all must write to" in own["elsewhere"]
    half = make_trainer(tmp_path).accelerator
    monkeypatch.setattr(type(half), "mixed_precision", "fp16")
    with pytest.raises(TrainerError, match=r"train.sharding=fsdp2 does not go with model.precision=fp16.*take bf16"):
        sharding.shard(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), (), make_trainer(tmp_path).settings, half)


def test_a_trained_unet_is_refused():
    with pytest.raises(ValueError, match="shards adapters alone; with train.unet=lora set it to none"):
        TrainSettings(output="x", sharding="fsdp2", unet="lora")


def test_a_process_whose_disk_is_full_ends_all_and_leaves_nothing(ran):
    folder, outcomes = ran
    for own in outcomes:
        assert own["full"].startswith("CheckpointError: cannot write") and "process 1: OSError" in own["full"]
        assert f"Last good checkpoint: checkpoint-{SAVED:08d}" in own["full"] and "the disk is full" in own["full"]
    assert load_latest(folder / "full").step == SAVED
    assert [path.name for path in (folder / "full").iterdir() if path.name.startswith(".writing")] == []


def damage_missing(path):
    next(path.glob("shard-00002*")).unlink()


def damage_flipped(path):
    file = next(path.glob("shard-00001*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_missing, damage_flipped])
def test_a_broken_one_is_skipped(ran, tmp_path, caplog, damage):
    shutil.copytree(ran[0] / "sharded", tmp_path / "run")
    damage(load_latest(tmp_path / "run").path)
    assert load_latest(tmp_path / "run").step == SAVED and "skipping a broken checkpoint" in caplog.text


# --- adapters --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded-adapters")
    return make_models(root / "models"), make_photos(root / "photos")


SHARDED = {"train__sharding": "fsdp2"}
KILLED = """
from trainer.training import sharded_checkpoint
described = sharded_checkpoint.describe_file
def killed(path):
    if rank == 1 and "00000004" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return described(path)
sharded_checkpoint.describe_file = killed
"""


@pytest.mark.slow
def test_an_adapter_killed_amid_a_save_goes_on_and_is_exported(files, tmp_path):
    """Two processes, of which one is killed while the second checkpoint is written; then two more, to the end."""
    changes = {"loss__face_dropout": 0.6, "adapter__null": "learned", "optimiser__lr": 1e-4}
    pictures = {"train__validate_every": 6, "validation__steps": 2, "validation__prompts": ["a face"]}
    code, told = launch(make_config(*files, tmp_path / "one/run", **changes, **pictures), tmp_path / "one")
    assert code == 0, told
    config = make_config(*files, tmp_path / "two/run", **changes, **pictures, **SHARDED)
    code, told = launch(config, tmp_path / "two", 2, KILLED, "torchrun")
    assert code != 0
    assert [path.name for path in list_checkpoints(tmp_path / "two/run")] == ["checkpoint-00000002"], told
    code, told = launch(config, tmp_path / "two", 2, launcher="torchrun")
    assert code == 0 and "checkpoint-00000002" in told, told
    one, two = (load_latest(tmp_path / name / "run") for name in ("one", "two"))
    assert two.step == 6 and two.sharded and max(differences(one, two).values()) < 1e-5
    logs = [
        [json.loads(line) for line in (tmp_path / name / "run/log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [line["loss"] for line in logs[1]] == pytest.approx([line["loss"] for line in logs[0]], rel=1e-6)
    assert (tmp_path / "two/run/validation/step-00000006.png").is_file()
    adapters = [
        load_adapter(export(tmp_path / name / "run", tmp_path / f"{name}.safetensors")) for name in ("one", "two")
    ]
    assert largest_difference(*(adapter.tensors for adapter in adapters)) < 1e-3  # a step of half precision


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_with_a_checkpoint(files, tmp_path, number):
    endless = {"train__steps": 100_000, "train__checkpoint_every": 100_000, "data__workers": 1}
    run = write_run(make_config(*files, tmp_path / "run", **endless, **SHARDED), tmp_path, SLOWLY.format(seconds=0.2))
    with Run([*command("torchrun", 2), *run], tmp_path / "output.txt") as started:
        started.wait_until((tmp_path / "run/log.jsonl").exists)
        started.send(number)
        started.wait(30)
        (saved,) = list_checkpoints(tmp_path / "run")
        assert load_checkpoint(saved).step > 0 and "stopped at step" in started.output
