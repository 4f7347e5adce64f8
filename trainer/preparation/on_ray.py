"""The stages of the preparation on Ray Data: on this machine, or on a cluster whose disk all machines share.

A batch is one task of an actor. Where an actor or its machine dies, Ray starts another and gives it the batch again;
what other batches have made stays.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import TrainerError
from .photo import Batch

Make = Callable[..., Callable[[Batch], Batch]]


class Worker:
    """One actor: the stages, made once, and called with one batch after the other.

    Args:
        make: the class of the pipeline.
        arguments: of it.
    """

    def __init__(self, make: Make, arguments: tuple[Any, ...]) -> None:
        import torch

        torch.set_num_threads(1)
        self.pipeline = make(*arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"batch": pickle.dumps(self.pipeline(pickle.loads(row["batch"])))}


def work(
    make: Make, arguments: tuple[Any, ...], batches: Sequence[Batch], workers: int, gpus: float
) -> Iterator[Batch]:
    """The batches through the stages, in the order in which they are done.

    Args:
        make: the class of the pipeline; every actor makes one.
        arguments: of it; all machines have to find the files that they name.
        batches: the photos.
        workers: the most actors; they take turns where there are fewer processors.
        gpus: of each actor.

    Raises:
        TrainerError: Ray is not installed, or its cluster cannot work on the batches.
    """
    try:
        import ray
        from ray.data import DataContext
        from ray.exceptions import RayError
    except ImportError as error:
        raise TrainerError("runner=ray needs Ray Data: pip install 'feedface[ray]'") from error
    started = not ray.is_initialized()
    if started:  # RAY_ADDRESS names a cluster
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
    DataContext.get_current().enable_progress_bars = False
    try:
        rows = [{"batch": pickle.dumps(batch)} for batch in batches]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker, fn_constructor_args=(make, arguments), concurrency=(1, max(1, workers)), num_gpus=gpus or None
        )
        for row in done.iter_rows():
            yield pickle.loads(row["batch"])
    except RayError as error:
        raise TrainerError(f"runner=ray: {str(error)[-1500:]}") from error
    finally:
        if started:
            ray.shutdown()
