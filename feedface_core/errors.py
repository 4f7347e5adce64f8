"""The error of this package, and how what pydantic found reads in it."""

from __future__ import annotations

from pydantic import ValidationError


class FeedFaceError(ValueError):
    """Something given to FeedFace cannot be used; the message says what and where, what was found and what to do."""


def problems(error: ValidationError) -> str:
    """Each problem of a validation as ``name: what is expected, found …``, joined with semicolons."""

    def read(problem) -> str:
        name = ".".join(map(str, problem["loc"]))
        text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        text = text.replace("Unexpected keyword argument", "not known to this version")
        found = "" if problem["type"] in ("missing", "value_error", "unexpected_keyword_argument") else problem["input"]
        return f"{name + ': ' if name else ''}{text}{f', found {repr(found)[:60]}' if found != '' else ''}"

    listed = error.errors(include_url=False)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return "; ".join(read(problem) for problem in listed[:5]) + more
