"""One photo on its way through the stages, and what a stage is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from feedface_core.errors import FeedFaceError
from feedface_core.faces import DetectedFace

from ..data.pictures import to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = list["Photo"]


class Drop(Exception):
    """This photo is left out. Arguments: a few words, the same for all photos with this problem, since they are
    counted; and what was found in this one."""


@dataclass
class Photo:
    """A photo, what came with it, and what the stages found.

    Args:
        id: stable name: the path below the input folder, or as the table gives it.
        path: the file.
        given: columns of the table or of files beside the photo (caption, identity, bbox, mask_path, consent).
        row: columns of the manifest so far.
        reason, detail: why it was left out; an empty reason keeps it.
        vector: identity vector, where faces are compared; empty for a face that was not found again.
        vectors: the same of the other faces.
        picture: the upright photo. This and what follows is there while the photo is worked on.
        face: the face, the largest one.
        crop: ``(S, S, 3)``.
        mask: ``(H, W)`` bool, of all faces.
        others: the further faces of a photo with several people; their columns are ``row["faces"]``.
        crops: of them.
    """

    id: str
    path: Path
    given: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    detail: str = ""
    vector: list[float] | None = None
    vectors: list[list[float]] = field(default_factory=list)
    picture: Image | None = None
    face: DetectedFace | None = None
    crop: Tensor | None = None
    mask: Tensor | None = None
    others: list[DetectedFace] = field(default_factory=list)
    crops: list[Tensor] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether no stage has left it out."""
        return not self.reason

    @property
    def image(self) -> Tensor:
        """The photo as ``(H, W, 3)`` floats in 0…1, made anew: for a batch of large photos it would be gigabytes."""
        return to_tensor(self.picture)


class Stage:
    """One step of the preparation: ``stage(batch) -> batch``.

    A stage is made once a process and then called with one batch after the other, so models are loaded in
    ``__init__``. It works on photos one by one unless it overrides ``__call__``.
    """

    def __call__(self, batch: Batch) -> Batch:
        """Work on the photos that are still kept; those that cannot be used are marked with the reason."""
        for photo in batch:
            if photo.kept:
                try:
                    self.process(photo)
                except Drop as drop:
                    photo.reason, photo.detail = drop.args
                except FeedFaceError as error:
                    photo.reason, photo.detail = "unusable face", str(error)
        return batch

    def process(self, photo: Photo) -> None:
        """Work on one photo in place. Raises :class:`Drop` if it is to be left out."""
        raise NotImplementedError
