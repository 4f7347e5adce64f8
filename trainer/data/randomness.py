"""Randomness without state: every draw is a function of what it is for.

    draw = f(hash(seed, purpose, sample id, visit))

The hash is the counter: nothing is consumed, so a draw depends neither on the draws before it nor on which
process, worker or run makes it. Resuming needs no saved random state.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

Part = int | str


def seed_of(*parts: Part) -> int:
    """A 63-bit seed that any change of any part changes.

    Parts are told apart by their position, type and length: ``("a", "bc")`` and ``("ab", "c")`` differ, and
        so do
    ``1`` and ``"1"``.

    Raises:
        TypeError: for a part that is neither an integer nor a string.
    """
    pieces = []
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"randomness is derived from integers and strings, found {part!r}")
        text = part.encode() if isinstance(part, str) else b"%d" % part
        pieces.append(b"%c%d:%b" % (b"s" if isinstance(part, str) else b"i", len(text), text))
    return int.from_bytes(hashlib.blake2b(b"".join(pieces), digest_size=8).digest(), "big") >> 1


def uniform(*parts: Part) -> float:
    """A number in [0, 1), uniform over the parts."""
    return (seed_of(*parts) >> 10) / 2**53


def integer(below: int, *parts: Part) -> int:
    """An integer in 0 … below − 1."""
    return int(uniform(*parts) * below)


def chance(probability: float, *parts: Part) -> bool:
    """True with this probability; never for 0, always for 1."""
    return uniform(*parts) < probability


def generator(*parts: Part) -> torch.Generator:
    """A CPU generator for these parts; its numbers are the same whatever the device of the model."""
    return torch.Generator("cpu").manual_seed(seed_of(*parts))


def normal(shape: tuple[int, ...], *parts: Part) -> Tensor:
    """Standard normal numbers of a shape, float32 on the CPU."""
    return torch.randn(shape, generator=generator(*parts))


def permutation(count: int, *parts: Part) -> Tensor:
    """The numbers 0 … count − 1 in random order, ``(count,)`` int64."""
    return torch.randperm(count, generator=generator(*parts))
