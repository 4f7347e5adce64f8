"""The signals that ask a training run to stop. Nothing slow is imported here."""

from __future__ import annotations

import signal

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)  # Windows has the first two


def leave_signals_to_parent() -> None:
    """For loader workers: signals sent to the whole group are not theirs; they end with the training process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
