"""Which face detectors can be used here, and loading one: InsightFace, MTCNN or the whole image.

Nothing here downloads anything. A detector whose package or model files are missing is passed over by ``auto``, and
asking for it by name gives an error that says what is missing and where it was looked for.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from ...errors import FeedFaceError, shorten
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
        FeedFaceError: if there is no detector or device of that name.
    """
    try:
        device = str(torch.device(device))
    except (RuntimeError, TypeError) as error:
        raise FeedFaceError(f"device: found {shorten(device)}, expected cpu, cuda or cuda:N") from error

    def load(detector: type[Detector]) -> Detector:
        try:
            for package in detector.packages:
                importlib.import_module(package)
            if detector is InsightFaceDetector:
                pack = choose_pack(insightface_roots, model)
                return _load_insightface(*pack, 0.5 if threshold is None else threshold, recognition, device)
            if recognition:
                raise DetectorUnavailable(f"{MTCNN} finds faces but does not recognise them; {INSIGHTFACE} does")
            return _load_mtcnn(device, 0.9 if threshold is None else threshold)
        except (ImportError, RuntimeError, AssertionError) as error:  # torch raises the others for an absent device
            message = f"{detector.name} cannot be used on {device} ({shorten(error)}); it needs: {detector.install}"
            raise DetectorUnavailable(message) from error

    if name == WHOLE_IMAGE:
        return WholeImage()
    detectors = {INSIGHTFACE: InsightFaceDetector, MTCNN: MtcnnDetector}
    if name in detectors:
        return load(detectors[name])
    if name != AUTO:
        found = shorten(name)
        raise FeedFaceError(f"no face detector {found}; there are: {AUTO}, {', '.join(DETECTOR_NAMES)}")
    problems = []
    for detector in detectors.values():
        try:
            return load(detector)
        except DetectorUnavailable as error:
            logger.info("%s", error)
            problems.append(f"{detector.name} [{detector.licence}]: {error}")
    raise DetectorUnavailable(
        f"no face detector is usable here. {'. '.join(problems)}. Install one of them, choose {WHOLE_IMAGE!r} for"
        " photos that are cropped to the face already, or give boxes or a mask"
    )
