"""Which face detectors can be used here, and loading one: InsightFace, MTCNN or the whole image.

Nothing here downloads anything. A detector whose package or model files are missing is passed over by
``auto``, and asking for it by name gives an error that says what is missing and where it was looked for.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..box import FaceError
from .base import INSIGHTFACE, MTCNN, WHOLE_IMAGE, Detector, DetectorUnavailable, WholeImage
from .models import InsightFaceDetector, InsightFacePack, MtcnnDetector, find_insightface_packs

logger = logging.getLogger(__name__)

AUTO = "auto"
DETECTOR_NAMES = (INSIGHTFACE, MTCNN, WHOLE_IMAGE)


@dataclass(frozen=True)
class DetectorStatus:
    """Whether a detector can be used here: ``problem`` is empty if it can."""

    name: str
    licence: str
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.name} [{self.licence}]: {self.problem or 'available'}"


def detector_status(insightface_roots: Sequence[str | Path] = ()) -> list[DetectorStatus]:
    """What is installed, in the order in which ``auto`` chooses. Imports and loads nothing."""
    problems = {INSIGHTFACE: "", MTCNN: "", WHOLE_IMAGE: ""}
    missing = [name for name in ("insightface", "onnxruntime") if not _installed(name)]
    if missing:
        problems[INSIGHTFACE] = f'not installed: {", ".join(missing)}; "{InsightFaceDetector.INSTALL}"'
    elif not find_insightface_packs(insightface_roots):
        problems[INSIGHTFACE] = f"no model files; {_where_models_go(insightface_roots)}"
    if not _installed("facenet_pytorch"):
        problems[MTCNN] = f'not installed: facenet-pytorch; "{MtcnnDetector.INSTALL}"'
    kinds: tuple[type[Detector], ...] = (InsightFaceDetector, MtcnnDetector, WholeImage)
    return [DetectorStatus(kind.name, kind.licence, problems[kind.name]) for kind in kinds]


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
        model: InsightFace model pack; the first of :data:`INSIGHTFACE_PACKS` that is there by default.
        threshold: lowest confidence of a face; 0.9 for MTCNN and 0.5 for InsightFace by default.
        recognition: also compute identity vectors (InsightFace only).
        device: where the model runs.

    Raises:
        DetectorUnavailable: if the detector, or with ``"auto"`` every detector, is missing; says of each why.
        FaceError: if there is no detector of that name.
    """
    if name == AUTO:
        return _load_first_usable(insightface_roots, model, threshold, recognition, device)
    if name == WHOLE_IMAGE:
        return WholeImage()
    if name == MTCNN:
        if recognition:
            raise DetectorUnavailable(f"{MTCNN} finds faces but does not recognise them; {INSIGHTFACE} does")
        return _load_mtcnn(str(device), 0.9 if threshold is None else threshold)
    if name == INSIGHTFACE:
        pack = _choose_pack(insightface_roots, model)
        return _load_insightface(pack, 0.5 if threshold is None else threshold, recognition, str(device))
    raise FaceError(f"no face detector {name!r}; there are: {AUTO}, {', '.join(DETECTOR_NAMES)}")


_load_mtcnn: Callable[..., Detector] = lru_cache(maxsize=2)(MtcnnDetector)
_load_insightface: Callable[..., Detector] = lru_cache(maxsize=2)(InsightFaceDetector)


def _load_first_usable(roots, model, threshold, recognition, device) -> Detector:
    problems = []
    for status in detector_status(roots):
        if status.name == WHOLE_IMAGE:
            continue
        try:
            if not status.problem:
                return load_detector(
                    status.name,
                    insightface_roots=roots,
                    model=model,
                    threshold=threshold,
                    recognition=recognition,
                    device=device,
                )
            problems.append(str(status))
        except DetectorUnavailable as error:
            logger.warning("%s", error)
            problems.append(f"{status.name} [{status.licence}]: {error}")
    raise DetectorUnavailable(
        "no face detector is usable here. "
        + ". ".join(problems)
        + f". Install one of them, choose {WHOLE_IMAGE!r} for photos that are cropped to the face already,"
        " or give boxes or a mask"
    )


def _choose_pack(roots: Sequence[str | Path], model: str | None) -> InsightFacePack:
    packs = find_insightface_packs(roots)
    chosen = [pack for pack in packs if model in (None, pack.name)]
    if not chosen:
        named = f" named {model!r}" if model else ""
        found = f"; found: {', '.join(pack.name for pack in packs)}" if packs else ""
        raise DetectorUnavailable(
            f"no InsightFace model files{named}{found}; {_where_models_go(roots)}. Put a model pack there, or choose"
            f" {MTCNN!r}, which brings its weights along"
        )
    return chosen[0]


def _where_models_go(roots: Sequence[str | Path]) -> str:
    if not roots:
        return "no folder to look in was given"
    return "looked for *.onnx in " + ", ".join(str(Path(root) / "models" / "<name>") for root in roots)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def face_embedding(
    image: Tensor, *, insightface_roots: Sequence[str | Path], model: str | None = None
) -> Tensor | None:
    """Identity vector ``(E,)`` of unit length of the largest face, or None if there is no face.

    The cosine of two of them measures the likeness.

    Raises:
        DetectorUnavailable: if InsightFace or its models are missing.
    """
    detector = load_detector(INSIGHTFACE, insightface_roots=insightface_roots, model=model, recognition=True)
    faces = detector.detect(image)
    return max(faces, key=lambda face: face.area).embedding if faces else None
