"""Photos that turn out to be unreadable while a run is going on: how many may, and who they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import TrainerError, first_of

if TYPE_CHECKING:
    from ..config import DataSettings

logger = logging.getLogger(__name__)


class PhotoBudget:
    """Counts the photos that could not be read; :class:`~trainer.data.dataset.FaceDataset` replaced their samples.

    Args:
        allowed: how many may be.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.photos: dict[str, str] = {}

    @classmethod
    def of(cls, settings: DataSettings, photos: int) -> PhotoBudget:
        """What ``data.unreadable_photos`` and ``data.unreadable_share`` allow of so many photos."""
        return cls(max(settings.unreadable_photos, int(settings.unreadable_share * photos)))

    def exceeded_by(self, photos: Mapping[str, str]) -> bool:
        """Count photos in, by id with the reason, and name those that are new; whether there are too many now."""
        for name in sorted(photos.keys() - self.photos.keys()):
            self.photos[name] = photos[name]
            text = "%s cannot be read, another sample takes its place (%d such photos, at most %d): %s"
            logger.warning(text, name, len(self.photos), self.allowed, photos[name])
        return len(self.photos) > self.allowed

    def error(self, step: int) -> TrainerError:
        """What to stop with, once the checkpoint of a step is written."""
        reasons = [f"{name}: {reason}" for name, reason in self.photos.items()]
        return TrainerError(
            f"{len(reasons)} photo(s) cannot be read, more than data.unreadable_photos={self.allowed} allows:"
            f"{first_of(reasons)}\nA checkpoint of step {step} is written: mend the photos or raise the number, and "
            "start again to go on from there"
        )
