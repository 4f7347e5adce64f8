"""The error of this package, and how what was found reads in its messages."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import TypeAdapter, ValidationError


class FeedFaceError(ValueError):
    """Something given to FeedFace cannot be used; the message says what and where, what was found and what to do."""


class MissingFile(FeedFaceError, FileNotFoundError):
    """There is no file of that name."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 70


def shorten(found: Any) -> str:
    """A found value as it reads in a message: at most 80 characters (160 of an error), however large the value."""
    torch = sys.modules.get("torch")  # not imported: the queue runs without it
    if torch is not None and isinstance(found, torch.Tensor):
        shape = "different sizes" if found.is_nested else f"shape {str(tuple(found.shape))[:60]}"
        return f"{found.dtype} of {shape}"
    if isinstance(found, Exception):
        return f"{type(found).__name__}: {found}".split("\n")[0][:160]
    try:
        return _SHORT.repr(found)[:80]
    except ValueError:  # Python refuses to write out integers of more than 4300 digits
        return "a number of thousands of digits"


def listing(names: Iterable[Any], most: int = 3) -> str:
    """The first few of several names, each cut to 120 characters, on one line whatever they hold."""
    names = list(names)
    return ", ".join(_printable(str(name)[:120]) for name in names[:most]) + (" …" if len(names) > most else "")


def _printable(text: str) -> str:
    """A file may have names that hold ends of lines, or what a terminal takes for a command."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def refuse(problems: Sequence[str], shown: int = 10) -> None:
    """Raise ``FeedFaceError`` with the first of the problems, a line each; nothing happens where there are none."""
    if problems:
        more = [f"… and {len(problems) - shown} more"] if len(problems) > shown else []
        raise FeedFaceError("\n".join([*problems[:shown], *more]))


@contextmanager
def located(where: Any) -> Iterator[None]:
    """Puts where it happened in front of the errors raised inside, such as a path, cut to 400 characters."""
    try:
        yield
    except FeedFaceError as error:
        raise type(error)(f"{str(where)[:400]}: {error}") from error


def typed(adapter: TypeAdapter, value: Any) -> Any:
    """``value`` as the adapter's type, read as JSON when it is a text. Raises :class:`FeedFaceError`."""
    try:
        return adapter.validate_json(value) if isinstance(value, str) else adapter.validate_python(value)
    except ValidationError as error:
        raise FeedFaceError(problems(error)) from None


def problems(error: ValidationError) -> str:
    """Each problem of a validation as ``name: what is expected, found …``, joined with semicolons."""

    def read(problem) -> str:
        name = ".".join(str(part)[:80] for part in problem["loc"][:8])
        text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        text = text.split(" or instance of")[0].replace("Unexpected keyword argument", "not known to this version")
        if problem["type"] not in ("missing", "value_error", "unexpected_keyword_argument"):
            text = f"{text[:300]}, found {shorten(problem['input'])}"
        return f"{name}: {text[:400]}" if name else text[:400]

    listed = error.errors(include_url=False)
    return "; ".join(map(read, listed[:4])) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
