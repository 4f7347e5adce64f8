"""Fixtures of the trainer's tests."""

from __future__ import annotations

import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def alone():
    """For runs in this process: one thread, as in the processes they are compared with, and no state of another run."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")]
    threads, handlers = torch.get_num_threads(), [signal.getsignal(number) for number in numbers]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert [signal.getsignal(number) for number in numbers] == handlers, "a run has kept a signal"
