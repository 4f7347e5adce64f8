"""The stage that gives photos the vectors of their faces, with the recognisers of the core."""

from __future__ import annotations

from torch import Tensor

from feedface_core.errors import FeedFaceError
from feedface_core.faces.recognisers import Recogniser
from feedface_core.faces.recognisers import load_recogniser as load

from ..config.preparation import DetectSettings, IdentitySettings
from ..errors import TrainerError
from .identities import compares_faces
from .photo import Drop, Photo, Stage


def load_recogniser(settings: IdentitySettings, detect: DetectSettings) -> Recogniser:
    """The recogniser that the settings name.

    Raises:
        TrainerError: if it is not installed, or with auto if none is.
    """
    options = {"insightface_roots": detect.insightface_roots, "model": detect.model, "device": detect.device}
    try:
        return load(settings.recogniser, **options)
    except FeedFaceError as error:
        raise TrainerError(f"identity.source={settings.source} needs a face recogniser: {error}") from error


class Recognise(Stage):
    """Gives photos whose faces are compared the vector of theirs; it stays empty for a face that is not found again.

    Args:
        recogniser: that looks at the faces.
        settings: say which faces are compared; to cluster them, all have to be recognised.
    """

    def __init__(self, recogniser: Recogniser, settings: IdentitySettings) -> None:
        self.recogniser, self.settings = recogniser, settings

    def process(self, photo: Photo) -> None:
        if not compares_faces(photo, self.settings):
            return
        vector = self.recogniser.vector(photo.image, photo.face)
        if vector is None and self.settings.source == "cluster":
            raise Drop("face not recognised", self.recogniser.name)
        photo.vector = [] if vector is None else _rounded(vector)
        others = self.recogniser.vectors(photo.image, photo.others) if photo.others else []
        photo.vectors = [[] if one is None else _rounded(one) for one in others]


def _rounded(vector: Tensor) -> list[float]:
    return [round(value, 6) for value in vector.tolist()]
