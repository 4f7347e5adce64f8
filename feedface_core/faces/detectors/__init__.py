"""Which face detectors can be used here, and loading one: InsightFace, MTCNN or the whole image.

Nothing here downloads anything. A detector whose package or model files are missing is passed over by ``auto``, and
asking for it by name gives an error that says what is missing and where it was looked for.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from ...errors import FeedFaceError
from .base import INSIGHTFACE, MTCNN, WHOLE_IMAGE, Detector, DetectorUnavailable, WholeImage
from .insightface import InsightFaceDetector, choose_pack
from .mtcnn import MtcnnDetector

logger = logging.getLogger(__name__)

AUTO = "auto"
DETECTOR_NAMES = (INSIGHTFACE, MTCNN, WHOLE_IMAGE)

# A model takes seconds to load, and Detect Faces runs again for every photo.
_load_mtcnn = lru_cache(maxsize=2)(MtcnnDetector)
_load_insightface = lru_cache(maxsize=2)(InsightFaceDetector)


def load_detector(
    name: str = AUTO,
    *,
    insightface_roots: Sequence[str | Path] = (),
    model: str | None = None,
    threshold: float | None = None,
    recognition: bool = False,
    device: str | torch.device = "cpu",
) -> Detector:
    """A detector by name; one that was loaded before with the same choices is handed out again.

    Args:
        name: one of :data:`DETECTOR_NAMES`, or ``"auto"``: InsightFace if its models are there, else MTCNN.
        insightface_roots: folders that hold ``models/<pack>/*.onnx``.
        model: InsightFace model pack; the first of ``insightface.PACKS`` that is there by default.
        threshold: lowest confidence of a face; 0.9 for MTCNN and 0.5 for InsightFace by default.
        recognition: also compute identity vectors (InsightFace only).
        device: where the model runs.

    Raises:
        DetectorUnavailable: if the detector, or with ``"auto"`` every detector, is missing; says of each why.
        FeedFaceError: if there is no detector of that name.
    """
    if name == WHOLE_IMAGE:
        return WholeImage()
    if kind := {MTCNN: MtcnnDetector, INSIGHTFACE: InsightFaceDetector}.get(name):
        missing = [package for package in kind.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise DetectorUnavailable(f'not installed: {", ".join(missing)}; "{kind.install}"')
    if name == MTCNN:
        if recognition:
            raise DetectorUnavailable(f"{MTCNN} finds faces but does not recognise them; {INSIGHTFACE} does")
        return _load_mtcnn(str(device), 0.9 if threshold is None else threshold)
    if name == INSIGHTFACE:
        pack = choose_pack(insightface_roots, model)
        return _load_insightface(*pack, 0.5 if threshold is None else threshold, recognition, str(device))
    if name != AUTO:
        raise FeedFaceError(f"no face detector {name!r}; there are: {AUTO}, {', '.join(DETECTOR_NAMES)}")
    problems = []
    for kind in (InsightFaceDetector, MtcnnDetector):
        try:
            return load_detector(
                kind.name,
                insightface_roots=insightface_roots,
                model=model,
                threshold=threshold,
                recognition=recognition,
                device=device,
            )
        except DetectorUnavailable as error:
            logger.info("%s", error)
            problems.append(f"{kind.name} [{kind.licence}]: {error}")
    raise DetectorUnavailable(
        f"no face detector is usable here. {'. '.join(problems)}. Install one of them, choose {WHOLE_IMAGE!r} for"
        " photos that are cropped to the face already, or give boxes or a mask"
    )
