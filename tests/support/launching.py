"""Training runs under the launchers, as a user starts them, with room for a change to the code of each process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import yaml
from typing_extensions import Self

from trainer.config import Config

from .small_training import ROOT

#: What precedes the training in the process of each rank; ``rank`` is its number.
SCRIPT = """
import os, signal, sys, time
from trainer import train  # first, as in ``python -m trainer.train``
import torch
from trainer.models import adapter
from trainer.training import processes, step, validation
from trainer.training import trainer as loop
rank = int(os.environ.get("RANK", "0"))
{code}
sys.exit(train.main(sys.argv[1:]))
"""
#: Slow enough for a signal to come in the middle.
SLOWLY = """
forward = loop.Trainer._forward_backward
def slowly(self, batch):
    time.sleep({seconds})
    return forward(self, batch)
loop.Trainer._forward_backward = slowly
"""


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def command(launcher: str, processes: int) -> list[str]:
    """How the documentation starts ``processes`` processes; ``python`` is no launcher at all."""
    if launcher == "python":
        return [sys.executable]
    if launcher == "torchrun":  # is this module
        module = [sys.executable, "-m", "torch.distributed.run"]
        return [*module, "--nproc_per_node", str(processes), "--master_port", free_port()]
    several = ["--multi_gpu", "--main_process_port", free_port()] if processes > 1 else []
    return [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", str(processes), *several]


def write_run(config: Config, folder: Path, code: str = "") -> list[str]:
    """The script and the configuration of a run, written into a folder: what comes behind the launcher."""
    folder.mkdir(parents=True, exist_ok=True)
    path, script = folder / "config.yaml", folder / "script.py"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    script.write_text(SCRIPT.format(code=code))
    return [str(script), str(path)]


def _runs(process: psutil.Process, which: Callable[[psutil.Process], bool]) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE and which(process)
    except psutil.NoSuchProcess:  # it has just ended
        return False


def take_interrupts() -> None:
    """A shell starts its background jobs with SIGINT ignored; the tests may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """A launcher in a session of its own, and the processes below it. None of them outlives the ``with`` block.

    Args:
        line: the whole command line.
        log: file that takes the output of all processes.
        environment: variables on top of this process's.
    """

    def __init__(self, line: Sequence[str], log: Path, **environment: str):
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
        self.log = log
        self._below: set[psutil.Process] = set()
        with open(log, "w") as output:
            self._process = subprocess.Popen(
                list(line),
                cwd=ROOT,
                env={**os.environ, **own},
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=take_interrupts,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def send(self, number: int) -> None:
        """A signal to the launcher alone, after a look at who is below it."""
        self.below()
        self._process.send_signal(number)

    def below(self, which: Callable[[psutil.Process], bool] = lambda _: True) -> list[psutil.Process]:
        """Those of its processes that still run, even if the launcher does not, and are ``which``."""
        with suppress(psutil.NoSuchProcess):
            self._below.update(psutil.Process(self._process.pid).children(recursive=True))
        return [one for one in self._below if _runs(one, which)]

    def wait_until(self, what: Callable[[], object], seconds: float = 60) -> None:
        """Wait for something to be true; fails with the end of the output."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self.output[-4000:]}"
            time.sleep(0.05)

    def wait(self, seconds: float = 120) -> int:
        """The launcher's exit code, once all its processes have ended."""
        self.wait_until(lambda: self.below() == [] and self._process.poll() is not None, seconds)
        return self._process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.below():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        self._process.wait()


def launch(
    config: Config, folder: Path, processes: int = 1, code: str = "", launcher: str = "accelerate", seconds: float = 120
) -> tuple[int, str]:
    """Train to the end, a single process without launcher: exit code, and the output of all processes."""
    line = [*command(launcher if processes > 1 else "python", processes), *write_run(config, folder, code)]
    with Run(line, folder / "output.txt") as run:
        return run.wait(seconds), run.output
