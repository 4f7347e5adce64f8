"""The model packs of InsightFace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import shorten
from ..box import DetectedFace
from .base import INSIGHTFACE, Detector, DetectorUnavailable, to_bytes

PACKS = ("antelopev2", "buffalo_l", "buffalo_m", "buffalo_s", "buffalo_sc")
"""Model packs in order of preference; others follow by name."""


def find_insightface_packs(roots: Sequence[str | Path]) -> dict[str, Path]:
    """Name and folder of the model packs ``models/<name>/*.onnx`` below the given InsightFace folders (for example
    ``ComfyUI/models/insightface``), preferred ones first."""
    packs: dict[str, Path] = {}
    for root in roots:
        for folder in sorted(Path(root).expanduser().glob("models/*")):
            # The archive of antelopev2 unpacks into antelopev2/antelopev2.
            for path in (folder, folder / folder.name):
                if any(path.glob("*.onnx")):
                    packs.setdefault(folder.name, path.resolve())
    return dict(sorted(packs.items(), key=lambda item: (PACKS.index(item[0]) if item[0] in PACKS else 99, item[0])))


def choose_pack(roots: Sequence[str | Path], name: str | None) -> tuple[str, Path]:
    """Name and folder of a model pack, the preferred one when none is named. Raises :class:`DetectorUnavailable`."""
    packs = find_insightface_packs(roots)
    for found, path in packs.items():
        if name in (None, found):
            return found, path
    looked = ", ".join(str(Path(root) / "models" / "<name>") for root in roots) or "no folder (none given)"
    named = f" named {shorten(name)}" if name else ""
    found = f"; found: {', '.join(packs)}" if packs else ""
    raise DetectorUnavailable(
        f"no InsightFace model files{named}{found}; looked for *.onnx in {looked}. "
        "Put a model pack there, or choose 'mtcnn', which brings its weights along"
    )


class InsightFaceDetector(Detector):
    """The InsightFace model pack ``name`` in the folder ``path``, through its own ``FaceAnalysis``.

    The device is ``"cpu"``, or ``"cuda"`` if onnxruntime offers it.
    """

    name = INSIGHTFACE
    licence = "code MIT; model packs for non-commercial research only"
    packages = ("insightface", "onnxruntime")
    install = "pip install insightface onnxruntime"
    SIZES = (640, 320, 160)
    """Sides of the square the detector works on. A face that fills the photo is often found only at smaller ones."""

    def __init__(
        self, name: str, path: Path, threshold: float = 0.5, recognition: bool = False, device: str = "cpu"
    ) -> None:
        import onnxruntime
        from insightface.app import FaceAnalysis

        self.detail, self.threshold = name, threshold
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
                f"InsightFace cannot use the models in {path} (.onnx files: {files[:200]}): "
                f"{shorten(error) if str(error) else 'none of them is a face detector'}"
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
