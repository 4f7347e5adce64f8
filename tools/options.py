"""Numbers of command lines: whole or not, in their range, and refused by the option's name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable


def whole(low: int, high: int = 10**9) -> Callable[[str], int]:
    """For ``type=`` of an option that takes a whole number from low to high."""

    def read(text: str) -> int:
        # Python reads 1_0 and digits of other scripts as well, and refuses thousands of digits in words of its own.
        if not re.fullmatch(r"[+-]?[0-9]{1,40}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, found {text[:40]!r}")
        return int(text)

    return read


def number(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """The same for any finite number; ``above`` leaves out the lower end itself."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (above and value == low):  # a NaN is in no range
            kind = f"above {low:g}, at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"expected a number {kind}, found {text[:40]!r}")
        return value

    return read
