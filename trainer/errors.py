"""The error of the trainer's commands."""

from collections.abc import Mapping, Sequence
from typing import Any

from feedface_core.errors import FeedFaceError


class TrainerError(FeedFaceError):
    """Something given to the trainer cannot be used: settings, files, models. Commands print it and end with 1."""


def first_of(problems: Sequence[str], shown: int = 5) -> str:
    """The first problems, each on a line of its own, and how many more there are."""
    more = [f"… and {len(problems) - shown} more"] if len(problems) > shown else []
    return "".join(f"\n  {line}" for line in [*problems[:shown], *more])


def explain(problem: Mapping[str, Any]) -> str:
    """One of pydantic's ``ValidationError.errors()``: the name, what is wrong, and what was found."""
    name = ".".join(map(str, problem["loc"]))
    found = "" if problem["type"] in ("missing", "value_error") else f", found {problem['input']!r}"
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}{found}".removeprefix(": ")
