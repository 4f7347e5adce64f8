"""What every refusal of bad input has to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from feedface_core.errors import FeedFaceError

#: Seconds a refusal may take on a slow machine: nothing of the size asked for is built first.
PATIENCE = 20.0

NAN, INF = float("nan"), float("inf")
#: What is done to a weight of a file, by what it is then; None takes it out.
BROKEN_WEIGHTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda _: None,
    "NaN": lambda weight: torch.full_like(weight, NAN),
    "one NaN": lambda weight: weight.index_fill(0, torch.tensor([0]), NAN),
    "infinite": lambda weight: torch.full_like(weight, INF),
    "int64": lambda weight: weight.to(torch.int64),
    "bool": lambda weight: weight > 0,
    "complex": lambda weight: weight.to(torch.complex64),
    "more": lambda weight: torch.cat([weight, weight]),
    "no dimension": lambda weight: weight.sum(),
    "empty": lambda weight: weight[:0],
    "flat": lambda weight: weight.flatten()[:-1].clone(),
    "one dimension more": lambda weight: weight[None].contiguous(),
}


def refused(call: Callable[[], Any], *named: object, error: type[Exception] = FeedFaceError) -> str:
    """The message of a call that must be refused: by an error of the package, soon, in words that name what and where.

    Args:
        call: what to do with the bad input.
        named: what the message must contain, such as the file's path or the name of the node's input.
        error: the package's class of error; the nodes have a copy of their own.
    """
    started = time.monotonic()
    try:
        result = call()
    except error as caught:
        message = str(caught)
    except BaseException as caught:
        raise AssertionError(f"raised {type(caught).__name__}: {str(caught)[:300]}") from caught
    else:
        raise AssertionError(f"accepted without a word: {str(result)[:200]}")
    assert time.monotonic() - started < PATIENCE, "took too long"
    missing = [str(name) for name in named if str(name) not in message]
    assert not missing, f"does not name {missing}: {message[:400]}"
    assert len(message) < 1500, f"{len(message)} characters"
    return message
