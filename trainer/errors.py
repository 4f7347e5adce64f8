"""The error of the trainer, and how its commands report one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from feedface_core.errors import FeedFaceError, shorten


class TrainerError(FeedFaceError):
    """Settings, models, data or checkpoints that cannot be used.

    The message says what and where first, then what was found, what was expected, and what to do.
    """

    def __init__(self, message: str) -> None:
        # torch raises an error of a loader process anew, with that process's traceback before the message.
        super().__init__(message.rpartition("trainer.errors.TrainerError: ")[2].rstrip())


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


def first_of(problems: Iterable[str], count: int | None = None) -> str:
    """The first five problems, each on a line of its own, and how many more there are.

    Args:
        problems: may be made as they are needed.
        count: how many there are; needed unless they are a sequence.
    """
    more = (len(problems) if count is None else count) - 5
    lines = [*islice(problems, 5), *([f"… and {more} more"] if more > 0 else [])]
    return "".join(f"\n  {line}" for line in lines)


def explain(problem: Mapping[str, Any]) -> str:
    """One of pydantic's ``ValidationError.errors()``: the name, what is wrong, and what was found."""
    name = shorten(".".join(map(str, problem["loc"])))[1:].removesuffix("'")
    found = "" if problem["type"] in ("missing", "value_error") else f", found {shorten(problem['input'])}"
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}{found}".removeprefix(": ")
