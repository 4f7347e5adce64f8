"""Randomness without state: every draw is a function of its key, which says what it is for.

    draw = f(hash(seed, purpose, sample id, visit))

The hash is the counter: nothing is consumed, so a draw depends neither on the draws before it nor on which
process, worker or run makes it. Resuming needs no saved random state.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

Key = int | str


def seed_of(*key: Key) -> int:
    """A 63-bit seed that any change of the key changes.

    Its elements are told apart by position, type and length: ``("a", "bc")`` and ``("ab", "c")`` differ, and so do
    ``1`` and ``"1"``.

    Raises:
        TypeError: for an element that is neither an integer nor a string.
    """
    pieces = []
    for element in key:
        if isinstance(element, bool) or not isinstance(element, (int, str)):
            raise TypeError(f"randomness is derived from integers and strings, found {element!r}")
        text = str(element).encode()
        pieces.append(b"%c%d:%b" % (b"s" if isinstance(element, str) else b"i", len(text), text))
    return int.from_bytes(hashlib.blake2b(b"".join(pieces), digest_size=8).digest(), "big") >> 1


def uniform(*key: Key) -> float:
    """A number in [0, 1), uniform over the keys."""
    return (seed_of(*key) >> 10) / 2**53


def integer(below: int, *key: Key) -> int:
    """An integer in 0 … below − 1."""
    return int(uniform(*key) * below)


def chance(probability: float, *key: Key) -> bool:
    """True with this probability; never for 0, always for 1."""
    return uniform(*key) < probability


def generator(*key: Key) -> torch.Generator:
    """A CPU generator for this key; its numbers are the same whatever the device of the model."""
    return torch.Generator("cpu").manual_seed(seed_of(*key))


def normal(shape: tuple[int, ...], *key: Key) -> Tensor:
    """Standard normal numbers of a shape, float32 on the CPU."""
    return torch.randn(shape, generator=generator(*key))


def permutation(count: int, *key: Key) -> Tensor:
    """The numbers 0 … count − 1 in random order, ``(count,)`` int32: the same order as in int64, in half the memory."""
    return torch.randperm(count, generator=generator(*key), dtype=torch.int32)
