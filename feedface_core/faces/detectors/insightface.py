"""The model packs of InsightFace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..box import DetectedFace
from .base import INSIGHTFACE, Detector, DetectorUnavailable, to_bytes

PACKS = ("antelopev2", "buffalo_l", "buffalo_m", "buffalo_s", "buffalo_sc")
"""Model packs in order of preference; others follow by name."""


def find_insightface_packs(roots: Sequence[str | Path]) -> dict[str, Path]:
    """Name and folder of the model packs below the given InsightFace folders, preferred ones first.

    Args:
        roots: folders that hold ``models/<name>/*.onnx``, e.g. ``ComfyUI/models/insightface``.
    """
    packs: dict[str, Path] = {}
    for root in roots:
        models = Path(root).expanduser() / "models"
        for folder in sorted(models.iterdir()) if models.is_dir() else []:
            # The archive of antelopev2 unpacks into antelopev2/antelopev2.
            for path in (folder, folder / folder.name):
                if path.is_dir() and any(path.glob("*.onnx")):
                    packs.setdefault(folder.name, path.resolve())
    rank = {name: index for index, name in enumerate(PACKS)}
    return dict(sorted(packs.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0])))


def choose_pack(roots: Sequence[str | Path], name: str | None) -> tuple[str, Path]:
    """Name and folder of a model pack, the preferred one when none is named. Raises :class:`DetectorUnavailable`."""
    packs = find_insightface_packs(roots)
    for found, path in packs.items():
        if name in (None, found):
            return found, path
    looked = ", ".join(str(Path(root) / "models" / "<name>") for root in roots)
    named = f" named {name!r}" if name else ""
    found = f"; found: {', '.join(packs)}" if packs else ""
    raise DetectorUnavailable(
        f"no InsightFace model files{named}{found}; looked for *.onnx in {looked or 'no folder (none given)'}. "
        "Put a model pack there, or choose 'mtcnn', which brings its weights along"
    )


class InsightFaceDetector(Detector):
    """An InsightFace model pack through its own ``FaceAnalysis``.

    Args:
        name: of the pack.
        path: the folder of its models.
        threshold: lowest score that counts as a face.
        recognition: also compute the identity vector of every face.
        device: ``"cpu"``, or ``"cuda"`` if onnxruntime offers it.
    """

    name = INSIGHTFACE
    licence = "code MIT; model packs for non-commercial research only"
    packages = ("insightface", "onnxruntime")
    install = "pip install insightface onnxruntime"
    SIZES = (640, 320, 160)
    """Sides of the square the detector works on. A face that fills the photo is often found only at smaller ones."""

    def __init__(
        self,
        name: str,
        path: Path,
        threshold: float = 0.5,
        recognition: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        self.detail, self.threshold = name, threshold
        try:
            import onnxruntime
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise DetectorUnavailable(
                f'the detector {INSIGHTFACE!r} needs its packages ({error}): "{self.install}"'
            ) from error
        cuda = "CUDAExecutionProvider"
        on_cuda = torch.device(device).type == "cuda" and cuda in onnxruntime.get_available_providers()
        self.context = 0 if on_cuda else -1
        try:
            # An absolute path as the name is used as it is, by 0.7 and by 2.x, and never looked for online.
            self.analysis = FaceAnalysis(
                name=str(path),
                allowed_modules=["detection", *(["recognition"] if recognition else [])],
                providers=[*([cuda] if on_cuda else []), "CPUExecutionProvider"],
            )
        except Exception as error:  # AssertionError, ConnectionError, and whatever onnxruntime has for broken files
            files = ", ".join(sorted(file.name for file in path.glob("*.onnx"))) or "none"
            raise DetectorUnavailable(
                f"InsightFace cannot use the models in {path} (.onnx files: {files}):"
                f" {str(error) or 'none of them is a face detector'} ({type(error).__name__})"
            ) from error
        if recognition and "recognition" not in self.analysis.models:
            raise DetectorUnavailable(f"the InsightFace models in {path} hold no face recogniser")

    def find(self, image: Tensor) -> list[DetectedFace]:
        pixels = to_bytes(image).numpy()[..., ::-1].copy()  # (H, W, 3) blue, green, red
        found = []
        for side in self.SIZES:
            self.analysis.prepare(ctx_id=self.context, det_thresh=self.threshold, det_size=(side, side))
            found = self.analysis.get(pixels)
            if found or getattr(self.analysis.det_model, "static_input_size", None):
                break
        return [self._face(face) for face in found]

    def _face(self, face) -> DetectedFace:
        landmarks, embedding = face.kps, getattr(face, "embedding", None)
        if embedding is not None:
            embedding = F.normalize(torch.from_numpy(embedding).float().flatten(), dim=0)
        return DetectedFace(
            box=tuple(face.bbox.tolist()),
            confidence=float(face.det_score),
            landmarks=None if landmarks is None else torch.from_numpy(landmarks).float(),
            embedding=embedding,
            source=self.name,
        )
