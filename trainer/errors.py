"""The error of the trainer, and how its commands report one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def first_of(problems: Sequence[str], shown: int = 5) -> str:
    """The first problems, each on a line of its own, and how many more there are."""
    more = [f"… and {len(problems) - shown} more"] if len(problems) > shown else []
    return "".join(f"\n  {line}" for line in [*problems[:shown], *more])


def explain(problem: Mapping[str, Any]) -> str:
    """One of pydantic's ``ValidationError.errors()``: the name, what is wrong, and what was found."""
    name = ".".join(map(str, problem["loc"]))
    found = "" if problem["type"] in ("missing", "value_error") else f", found {problem['input']!r}"
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}{found}".removeprefix(": ")
