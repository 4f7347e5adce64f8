"""Two processes under ``accelerate launch`` train the same weights as one."""

from __future__ import annotations

import json
import socket
import sys

import pytest
import yaml
from support.small_training import largest_difference, make_config, make_models, make_photos, run, weights


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    return make_models(root / "models"), make_photos(root / "photos")


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def launch(config, folder, processes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = ["-m", "trainer.train", str(path)]
    if processes > 1:
        several = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", free_port()]
        command = ["-m", "accelerate.commands.launch", *several, *command]
    return run([sys.executable, *command])


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
        folder.mkdir()
        outputs.append(folder / "run")
        result = launch(make_config(*files, outputs[-1], **changes), folder, processes)
        assert result.returncode == 0, result.stderr
        assert f"{processes} process(es)" in result.stderr
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
