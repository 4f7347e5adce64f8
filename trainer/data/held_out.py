"""People who are kept out of training, to see how a run does on faces that it has not seen.

Who is held out follows from a hash of the name alone: the same people in every run, whatever the seed, the order of the
manifest, and who comes to it later. A photo of nobody known counts as a person of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import TrainerError
from . import randomness
from .manifest import Record


def is_held_out(record: Record, share: float) -> bool:
    """Whether the person of a photo is among the share that is held out."""
    name = ("photo", record.id) if record.identity is None else ("person", record.identity)
    return randomness.chance(share, "held out", *name)


def split(records: Sequence[Record], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Photos to train on, and those of the people held out; both in the order of the records.

    Raises:
        TrainerError: if one of the two is empty, although ``share`` is above 0.
    """
    out = np.fromiter((is_held_out(record, share) for record in records), bool, len(records))
    trained, held = np.flatnonzero(~out), np.flatnonzero(out)
    if not len(held) or not len(trained):
        raise TrainerError(
            f"data.held_out={share:g} of the people leaves {len(trained)} photos to train on and {len(held)} held out; "
            "the data set has too few people for it. Change the share, or set it to 0"
        )
    return trained, held
