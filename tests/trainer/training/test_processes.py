"""Two processes under a launcher: the same weights as one, one checkpoint for both, and what goes wrong in one."""

from __future__ import annotations

import json
import signal
from datetime import timedelta

import pytest
from accelerate import PartialState
from support.launching import SLOWLY, Run, command, free_port, launch, write_run
from support.small_training import largest_difference, make_config, make_models, make_photos, weights

from trainer.cache import make_cache
from trainer.errors import TrainerError
from trainer.training.processes import make_accelerator

FILES = ("trainables", "optimiser", "ema")
PICTURES = {"train__validate_every": 3, "validation__steps": 2, "validation__prompts": ["a face"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    return make_models(root / "models"), make_photos(root / "photos")


#: Threads of the process group that outlive the training can abort the process while Python ends.
NO_THREAD_IS_LEFT = """
trained = train.train
def looked_at(config):
    finished = trained(config)
    threads = [open(f"/proc/self/task/{number}/comm").read().strip() for number in os.listdir("/proc/self/task")]
    assert not any("gloo" in name for name in threads), threads
    return finished
if sys.platform == "linux":
    train.train = looked_at
"""


def test_two_processes(files, tmp_path):
    # Much is dropped, so that a process is now and then without any face. At this learning rate AdamW, which
    # divides a gradient by its own size, does not blow the rounding of the smallest gradients up.
    changes = {
        "loss__face_dropout": 0.6,
        "adapter__null": "learned",
        "optimiser__accumulation": 2,
        "optimiser__lr": 1e-4,
    }
    outputs, logs = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        outputs.append(folder / "run")
        code, told = launch(make_config(*files, outputs[-1], **changes), folder, processes, NO_THREAD_IS_LEFT)
        assert code == 0, told
        assert f"{processes} process(es)" in told
        logs.append([json.loads(line) for line in (outputs[-1] / "log.jsonl").read_text().splitlines()])
    for name in ("trainables", "ema"):
        one, two = (weights(output, 6, name) for output in outputs)
        assert largest_difference(one, two) < 1e-5
    assert largest_difference(weights(outputs[0], 2), weights(outputs[0], 6)) > 2e-4
    # AdamW would hide a gradient that is twice as large: its norm does not.
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"samples per second"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_stopped_by_a_signal_and_resumed_is_bit_identical(files, tmp_path):
    """Two processes that make pictures, stopped somewhere and started again, against a run of one go."""
    changes = {"train__steps": 12, "train__checkpoint_every": 100, **PICTURES}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, told = launch(make_config(*files, whole / "run", **changes), whole, 2)
    assert code == 0, told
    config = make_config(*files, parts / "run", **changes)
    line = [*command("accelerate", 2), *write_run(config, parts, SLOWLY.format(seconds=0.3))]
    with Run(line, parts / "output.txt") as run:
        run.wait_until((parts / "run/validation/step-00000003.png").exists)
        run.send(signal.SIGTERM)
        run.wait(30)
    saved = [path.name for path in (parts / "run").glob("checkpoint-*")]
    assert len(saved) == 1 and 3 <= int(saved[0][-8:]) < 12, run.output
    code, told = launch(config, parts, 2)
    assert code == 0 and f"going on from {parts / 'run' / saved[0]}" in told, told
    for name in FILES:
        assert largest_difference(weights(whole / "run", 12, name), weights(parts / "run", 12, name)) == 0.0, name
    made = sorted(path.name for path in (parts / "run/validation").iterdir())  # those it was stopped in are missing
    assert made[0] == "step-00000003.png" and made[-1] == "step-00000012.png"
    for name in made:
        assert (parts / "run/validation" / name).read_bytes() == (whole / "run/validation" / name).read_bytes()


OWN_FOLDERS = """
import json
parse = train.parse
def own_folder(arguments):
    config = parse(arguments)
    if rank:
        changed = config.train.model_copy(update={"output": config.train.output + "-of-the-other"})
        config = config.model_copy(update={"train": changed})
    return config
train.parse = own_folder
run = loop.Trainer.run
def told(self):
    first = self.state.done
    finished = run(self)
    states = [processes.digest(own) for own in (self.state.model.state_dict(), self.state.optimiser_tensors())]
    print("\\n" + json.dumps({"rank": rank, "first": first, "states": states}), flush=True)
    return finished
loop.Trainer.run = told
"""


@pytest.mark.slow
@pytest.mark.parametrize("main, other", [(4, None), (None, 2)])
def test_every_process_goes_on_from_the_main_ones_checkpoint(files, tmp_path, main, other):
    """With a disk of its own for each process, only the main one has checkpoints, or the other has older ones."""
    folders = {0: tmp_path / "run", 1: tmp_path / "run-of-the-other"}
    for rank, steps in enumerate((main, other)):
        if steps is not None:
            config = make_config(*files, folders[rank], train__steps=steps, train__seed=rank)
            code, told = launch(config, tmp_path / f"before-{rank}")
            assert code == 0, told
    config = make_config(*files, folders[0], train__seed=0)
    code, told = launch(config, tmp_path, 2, OWN_FOLDERS)
    assert code == 0, told
    ends = [json.loads(line) for line in told.splitlines() if line.startswith('{"rank"')]
    assert sorted(end["rank"] for end in ends) == [0, 1]
    assert [end["first"] for end in ends] == [main or 0] * 2
    assert ends[0]["states"] == ends[1]["states"]
    assert not (folders[1] / "checkpoint-00000006").exists()


OTHER_BASE = """
load = adapter.load_frozen_model
def changed(*arguments):
    frozen = load(*arguments)
    if rank == 1:
        next(frozen.host.parameters()).add_(1.0)
    return frozen
adapter.load_frozen_model = changed
"""


@pytest.mark.slow
def test_processes_with_different_models_are_refused(files, tmp_path):
    code, told = launch(make_config(*files, tmp_path / "run"), tmp_path, 2, OTHER_BASE)
    assert code != 0
    assert "error: process 1 of 2 has another base" in told
    assert not list((tmp_path / "run").glob("checkpoint-*"))


FAILURES = """
def fail(self, step):
    if step == 2:
        raise ValueError("no picture today")
    time.sleep(5)
validation.Validation.__call__ = fail
encode = step.encode_batch
seen = []
def truncated(batch, frozen, encoder):
    seen.append(batch)
    if rank == 1 and len(seen) == 6:
        raise OSError("image file is truncated")
    return encode(batch, frozen, encoder)
step.encode_batch = truncated
"""


@pytest.mark.slow
def test_pictures_never_end_a_run_and_an_exception_saves_first(files, tmp_path):
    """Pictures that fail, then pictures for which the other process waits; then a photo that only it cannot read."""
    changes = {**PICTURES, "train__validate_every": 2, "train__checkpoint_every": 100}
    code, told = launch(make_config(*files, tmp_path / "run", **changes), tmp_path, 2, FAILURES)
    assert code != 0
    assert "the pictures of step 2 failed (1 so far), training goes on: ValueError: no picture today" in told
    assert "OSError: image file is truncated" in told
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-00000005"], told
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line.get("failed validations") for line in lines] == [None, 1]


@pytest.mark.slow
def test_processes_wait_as_long_as_the_settings_say(files, tmp_path):
    """Pictures that take longer than the limit: the limit is in force, and it is the one of the settings."""
    slow = "validation.Validation.__call__ = lambda self, step: time.sleep(9)"
    changes = {**PICTURES, "train__timeout_minutes": 0.05}
    code, told = launch(make_config(*files, tmp_path / "run", **changes), tmp_path, 2, slow)
    assert code != 0 and "imed out" in told
    assert make_config(*files, tmp_path).train.timeout_minutes >= 60


@pytest.mark.usefixtures("alone")
def test_the_cache_waits_as_long(files, tmp_path, monkeypatch):
    """Its main process reads every file once while the others wait."""
    given = {}
    monkeypatch.setattr("accelerate.PartialState", lambda **options: given.update(options) or PartialState())
    changes = {"data__cache": str(tmp_path / "cache"), "train__timeout_minutes": 33.0}
    make_cache(make_config(*files, tmp_path, **changes), progress=False)
    assert given["timeout"] == timedelta(minutes=33)


@pytest.mark.parametrize("variable, name", [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_other_engines_are_refused(files, tmp_path, monkeypatch, variable, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(
        TrainerError, match=f"^accelerate is configured for {name}, which this trainer does not support"
    ):
        make_accelerator(make_config(*files, tmp_path).train)


def test_fsdp_of_the_launcher_is_refused(files, tmp_path):
    tool, *_ = command("accelerate", 1)
    line = [tool, "launch", "--use_fsdp", "--num_processes", "2", "--main_process_port", free_port()]
    with Run([*line, *write_run(make_config(*files, tmp_path / "run"), tmp_path)], tmp_path / "output.txt") as run:
        assert run.wait() != 0
    assert "error: accelerate is configured for FSDP" in run.output and not (tmp_path / "run").exists()
