"""The error of the trainer, and how its commands report one."""

from __future__ import annotations

import sys
from collections.abc import Callable

from feedface_core.errors import FeedFaceError


class TrainerError(FeedFaceError):
    """Settings, models, data or checkpoints that cannot be used.

    The message says what and where first, then what was found, what was expected, and what to do.
    """


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command: 0, or 1 after ``error: …`` on the standard error for an error of the input.

    Anything else is a defect, and shows its traceback.
    """
    try:
        command()
    except FeedFaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
