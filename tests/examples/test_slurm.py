"""The SLURM script with stand-ins for srun and scontrol: stopped before the limit, back into the queue, gone on."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from support.launching import free_port
from support.small_training import ROOT, make_config, make_models, make_photos

SCRIPT = ROOT / "examples/slurm/train.sbatch"
SRUN = """#!{python}
import os, signal, subprocess, sys
count = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(sys.argv[1:], env={{**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(count)
]
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/bash
case $1 in
show) echo 127.0.0.1; echo 127.0.0.2 ;;
requeue) echo "$2" >> {requeued} ;;
esac
"""


@contextmanager
def job(tmp_path: Path, config: Path, *overrides: str) -> Iterator[subprocess.Popen]:
    """The script as SLURM runs it, on two tasks of this machine; none outlives the block."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = folder / name
        path.write_text(text.format(python=sys.executable, requeued=tmp_path / "requeued"))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    own |= {"SLURM_JOB_ID": free_port(), "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_NTASKS": "2", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "job.log", "a") as log:
        command = ["bash", str(SCRIPT), str(config), *overrides]
        process = subprocess.Popen(
            command, env=os.environ | own, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_job_goes_on_past_its_time_limit(tmp_path):
    models, manifest = make_models(tmp_path / "models"), make_photos(tmp_path / "photos")
    output, path = tmp_path / "run", tmp_path / "config.yaml"
    changes = {"train__steps": 100_000, "train__checkpoint_every": 100_000, "train__log_every": 1}
    path.write_text(yaml.safe_dump(make_config(models, manifest, output, **changes).model_dump(mode="json")))
    with job(tmp_path, path) as process:
        deadline = time.monotonic() + 200
        while not (output / "log.jsonl").is_file() or len((output / "log.jsonl").read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "job.log").read_text()[-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B: does
        assert process.wait(120) == 0
    log = (tmp_path / "job.log").read_text()
    assert "SIGUSR1: writing a checkpoint, then stopping" in log and "back into the queue" in log
    (checkpoint,) = output.glob("checkpoint-*")
    assert len((tmp_path / "requeued").read_text().split()) == 1
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    with job(tmp_path, path, f"train.steps={done + 2}") as process:
        assert process.wait(200) == 0, (tmp_path / "job.log").read_text()[-3000:]
    assert f"going on from {checkpoint}" in (tmp_path / "job.log").read_text()
    assert (output / f"checkpoint-{done + 2:08d}").is_dir()
    assert len((tmp_path / "requeued").read_text().split()) == 1, "a job that is done does not come again"


@pytest.mark.slow
def test_a_job_that_fails_is_not_queued_again(tmp_path):
    with job(tmp_path, tmp_path / "missing.yaml") as process:
        assert process.wait(120) == 1
    assert "missing.yaml: cannot read the configuration" in (tmp_path / "job.log").read_text()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("name", "machines", "processes"), [("one_gpu", 1, 1), ("eight_gpus", 1, 8), ("two_machines", 2, 16)]
)
def test_accelerate_reads_the_configurations(name, machines, processes):
    found = load_config_from_file(str(ROOT / f"trainer/configs/accelerate/{name}.yaml"))
    assert (found.num_machines, found.num_processes) == (machines, processes)
    assert found.mixed_precision == "no"  # or accelerate would choose what autocast computes in
