"""Stopping on request: by a signal, or because the launcher has ended.

SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a checkpoint and the end. What the launchers make of a signal that is sent
to *them* (accelerate 1.15, torch 2.14):

=====================================  =======================================  ===========================
launcher                               SIGTERM, SIGINT, SIGHUP, SIGQUIT         SIGUSR1
=====================================  =======================================  ===========================
``torchrun``, ``accelerate launch``    goes to each training process and its    the launcher dies, nothing
with several processes                 loader workers; SIGKILL after 30 s       is passed on
                                       (``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``)
``accelerate launch`` with one         the launcher dies, nothing is passed on  the same
process
=====================================  =======================================  ===========================

So a training process also watches its launcher, and takes its death for a SIGTERM. Nothing slow is imported here: who
imports this module first can say who started the process.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from typing_extensions import Self

from ..data.signals import SIGNALS

logger = logging.getLogger(__name__)

#: Seconds between two looks at the launcher.
POLL = 0.5
#: Seconds that the loop has to come to its next pass before the checkpoint is written from beside it.
GRACE = 10.0
LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "torchrun",
    "accelerate.commands.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
}


def find_launcher(process: int) -> int | None:
    """``process`` if that is a launcher of training processes, else None: a shell may end, and a run goes on."""
    try:
        words = psutil.Process(process).cmdline()
    except psutil.Error:
        return None
    return process if any(Path(word).name in LAUNCHERS for word in words) else None


#: Asked for as early as can be: after the launcher's death the system tells of another parent.
LAUNCHER = find_launcher(os.getppid())


class Interrupted(Exception):
    """Work that was broken off, because the run was asked to stop."""


class StopRequest:
    """Whether the run was asked to stop.

    Inside ``with``, the launcher's death is a SIGTERM to this process. After :meth:`listen`, signals set
    :attr:`requested`; before, they end the process, which then has nothing to save.

    Signals are read by a thread as well: Python's handlers wait until the main thread comes back to the interpreter,
    which can take the length of a backward pass.

    Attributes:
        requested: stop at the next opportunity.
    """

    def __init__(self) -> None:
        self.requested = False
        self._closed = False
        self._late: Callable[[], Any] = lambda: None
        self._handlers: dict[int, Any] = {}
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="stop request", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._handlers:
            signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._closed = True
        self._write.send(b"\0")
        self._thread.join()
        self._read.close()
        self._write.close()

    def listen(self, late: Callable[[], Any]) -> None:
        """Take the signals from now on. Call it in the main thread.

        Signals that are ignored stay so (SIGHUP under ``nohup``, SIGINT in the background of a script), but not in a
        process of ``torchrun``: its launcher passes them on all the same, and kills who does not end.

        Args:
            late: called from another thread when the request has not been met after :data:`GRACE` seconds.
        """
        self._late = late
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if "TORCHELASTIC_RUN_ID" in os.environ or signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:  # a second Ctrl-C means it
            signal.signal(number, signal.default_int_handler)

    def _watch(self) -> None:
        launcher, deadline = LAUNCHER, None
        while not self._closed:
            if launcher is not None and os.getppid() != launcher:
                logger.warning("the launcher (process %d) has ended", launcher)
                launcher = None
                os.kill(os.getpid(), signal.SIGTERM)
            if select.select([self._read], [], [], POLL)[0]:
                received = [signal.Signals(number).name for number in self._read.recv(64) if number in SIGNALS]
                if received and deadline is None:
                    self.requested = True
                    deadline = time.monotonic() + GRACE
                    logger.warning("%s: writing a checkpoint, then stopping", received[0])
            if deadline is not None and time.monotonic() > deadline and not self._closed:
                deadline = float("inf")
                try:
                    self._late()
                except Exception as error:  # the loop goes on to its own end, and tells what is wrong there
                    logger.error("%s", error)
