"""The error of the queue, and how several read in one."""

from __future__ import annotations

from collections.abc import Sequence


class QueueError(ValueError):
    """Something given to the queue cannot be used, or it cannot go on; the message says where, and what to do."""


def refuse(problems: Sequence[str], shown: int = 10) -> None:
    """Raise ``QueueError`` with the first of the problems, a line each; nothing happens where there are none."""
    if problems:
        more = [f"… and {len(problems) - shown} more"] if len(problems) > shown else []
        raise QueueError("\n".join([*problems[:shown], *more]))
