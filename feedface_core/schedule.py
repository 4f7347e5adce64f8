"""How the strength of a face changes over the steps of a run and over the blocks of a model, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .errors import FeedFaceError, listing, shorten

CURVES = ("constant", "linear", "ease", "peak")
LARGEST_FACTOR = 10.0
_MOST_POINTS, _EASE_POINTS = 100, 33

Point = tuple[float, float]


@dataclass(frozen=True)
class Schedule:
    """Factors on the strength of a face.

    Args:
        points: share of the sampling run 0…1 → factor 0…10, straight lines between them; shares do not fall, and at two
            equal ones the factor jumps. Before the first point and after the last its factor holds.
        sites: beginnings of the names of blocks, with ``*`` and ``?`` as in file names → factor 0…10. The first that
            fits a block decides; a block that none fits has the factor 1.

    Raises:
        FeedFaceError: no or too many points, a share or factor out of its range, shares that fall, or an empty name.
    """

    points: tuple[Point, ...] = ((0.0, 1.0),)
    sites: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.points) <= _MOST_POINTS:
            raise FeedFaceError(f"points: found {len(self.points)}, expected 1 to {_MOST_POINTS}")
        last = 0.0
        for share, factor in self.points:
            if not last <= share <= 1.0:
                raise FeedFaceError(f"points: the share {share:g} after {last:g}; expected shares of 0 to 1 that rise")
            _check_factor("points", f"at {share:g}", factor)
            last = share
        for name, factor in self.sites:
            if not name:
                raise FeedFaceError("sites: a name is empty; expected for example 'in: 0.5, mid: 1'")
            _check_factor("sites", f"of {shorten(name)}", factor)

    @property
    def varies(self) -> bool:
        """Whether the factor changes over the steps."""
        return any(factor != self.points[0][1] for _, factor in self.points)

    def at(self, share: float) -> float:
        """The factor at a share of the run."""
        before = None
        for point in self.points:
            if point[0] > share:
                if before is None:
                    return point[1]
                part = (share - before[0]) / (point[0] - before[0])
                return before[1] + part * (point[1] - before[1])
            before = point
        return before[1]

    def of_site(self, name: str) -> float:
        """The factor of a block by its canonical name."""
        return next((factor for pattern, factor in self.sites if _fits(name, pattern)), 1.0)

    def check_sites(self, names: Iterable[str]) -> None:
        """Raises :class:`FeedFaceError` for a pattern that fits none of an adapter's blocks."""
        names = list(names)
        for pattern, _ in self.sites:
            if not any(_fits(name, pattern) for name in names):
                raise FeedFaceError(
                    f"sites: no block of the adapter begins with {shorten(pattern)}; it has "
                    f"{listing(names, 4) or 'none, since its face stands among the text'}"
                )


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, f"{pattern}*")


def _check_factor(what: str, where: str, factor: float) -> None:
    if not 0.0 <= factor <= LARGEST_FACTOR:  # a NaN is in no range
        raise FeedFaceError(f"{what}: the factor {where} is {factor:g}, expected 0 to {LARGEST_FACTOR:g}")


def curve_points(curve: str, first: float, last: float) -> tuple[Point, ...]:
    """A named curve from the factor ``first`` to ``last``.

    ``constant`` stays at ``first``; ``linear`` and ``ease`` (3t² − 2t³, slow at both ends) go to ``last``; ``peak``
    goes to ``last`` in the middle of the run and back.

    Raises:
        FeedFaceError: no such curve.
    """
    if curve == "constant":
        return ((0.0, first),)
    if curve == "linear":
        return ((0.0, first), (1.0, last))
    if curve == "peak":
        return ((0.0, first), (0.5, last), (1.0, first))
    if curve != "ease":
        raise FeedFaceError(f"curve is {shorten(curve)}, expected one of {', '.join(CURVES)}")
    shares = [number / (_EASE_POINTS - 1) for number in range(_EASE_POINTS)]
    return tuple((t, first + (last - first) * t * t * (3 - 2 * t)) for t in shares)


def parse_points(text: str) -> tuple[Point, ...]:
    """``"0:0, 0.3:1, 1:0.5"`` → points. Raises :class:`FeedFaceError` that names the part it does not understand."""
    return tuple((_number("points", share, text), factor) for share, factor in _pairs("points", text))


def parse_sites(text: str) -> tuple[tuple[str, float], ...]:
    """``"in: 0.5, mid: 1"`` → names and factors. Raises :class:`FeedFaceError` as :func:`parse_points`."""
    return tuple(_pairs("sites", text))


def _pairs(what: str, text: str) -> list[tuple[str, float]]:
    parts = [part for part in text.replace(";", ",").split(",") if part.strip()]
    pairs = []
    for part in parts:
        name, colon, factor = part.rpartition(":")
        if not colon:
            example = "0:0, 0.3:1, 1:0.5" if what == "points" else "in: 0.5, mid: 1"
            raise FeedFaceError(f"{what}: found {shorten(part.strip())}, expected pairs with a colon such as {example}")
        pairs.append((name.strip(), _number(what, factor, part)))
    return pairs


def _number(what: str, text: str, part: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise FeedFaceError(f"{what}: {shorten(text.strip())} in {shorten(part.strip())} is not a number")
    return value
