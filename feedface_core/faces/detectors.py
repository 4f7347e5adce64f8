"""Face detectors behind one interface: InsightFace, MTCNN, the whole image, and boxes or masks given by the user.

Nothing here downloads anything. A detector whose package or model files are missing is not offered, and asking for it by name
gives an error that says what is missing and where it was looked for.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .crops import check_image, mask_boxes
from .face import DetectedFace, FaceError

logger = logging.getLogger(__name__)

LONGEST_SIDE = 1024
"""Photos are shrunk to this many pixels before detection: faster, and at full size detectors find many false faces."""
AUTO = "auto"
INSIGHTFACE, MTCNN, WHOLE_IMAGE = "insightface", "mtcnn", "whole image"
DETECTOR_NAMES = (INSIGHTFACE, MTCNN, WHOLE_IMAGE)
INSIGHTFACE_PACKS = ("antelopev2", "buffalo_l", "buffalo_m", "buffalo_s", "buffalo_sc")
"""Model packs in order of preference; others follow by name."""


class DetectorUnavailable(FaceError):
    """The package or the model files of a detector are missing or do not work."""


class Detector(ABC):
    """Finds faces in one photo.

    Attributes:
        name: what the user chose it by.
        licence: of the code and the weights, in a few words.
        detail: the model in use, if there are several.
    """

    name: str
    licence: str
    detail: str = ""

    @property
    def description(self) -> str:
        """Name, model and licence in one line, for reports."""
        return f"{self.name}{f' ({self.detail})' if self.detail else ''} [{self.licence}]"

    def detect(self, image: Tensor) -> list[DetectedFace]:
        """Find the faces of a photo.

        Args:
            image: ``(H, W, 3)`` floats in 0..1, any size; greyscale and alpha as in ``crops.check_image``.

        Returns:
            The faces in the order of the model, boxes and landmarks in pixels of ``image``; empty if there is none.

        Raises:
            FaceError: if the image cannot be used.
        """
        image = check_image(image)
        height, width = image.shape[:2]
        small = shrink(image)
        scale = torch.tensor([width / small.shape[1], height / small.shape[0]])
        return [_rescale(face, scale) for face in self.find(small)]

    @abstractmethod
    def find(self, image: Tensor) -> list[DetectedFace]:
        """Find the faces of a photo ``(H, W, 3)`` that is already checked and shrunk; boxes in its pixels."""


def shrink(image: Tensor, longest_side: int = LONGEST_SIDE) -> Tensor:
    """Shrink ``(H, W, C)`` so that its longer side is at most ``longest_side`` pixels, antialiased; smaller photos stay as they are."""
    height, width = image.shape[:2]
    factor = longest_side / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    planes = image.permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(planes, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def _rescale(face: DetectedFace, scale: Tensor) -> DetectedFace:
    sx, sy = scale.tolist()
    x0, y0, x1, y1 = face.box
    landmarks = None if face.landmarks is None else face.landmarks * scale
    return replace(face, box=(x0 * sx, y0 * sy, x1 * sx, y1 * sy), landmarks=landmarks)


def _to_bytes(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8).cpu().contiguous()


class WholeImage(Detector):
    """Takes the whole photo as the face: for photos that are cropped to it already."""

    name = WHOLE_IMAGE
    licence = "no model"

    def find(self, image: Tensor) -> list[DetectedFace]:
        return [DetectedFace((0, 0, image.shape[1], image.shape[0]), source=self.name)]


class GivenMask(Detector):
    """Takes every connected region of a mask ``(H, W)`` as a face. The mask has the size of the photo."""

    name = "mask"
    licence = "no model"

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def detect(self, image: Tensor) -> list[DetectedFace]:
        image = check_image(image)
        if self.mask.shape != image.shape[:2]:
            raise FaceError(
                f"mask: {self.mask.shape[-1]} × {self.mask.shape[-2]} pixels, but the photo has"
                f" {image.shape[1]} × {image.shape[0]}"
            )
        return self.find(image)

    def find(self, image: Tensor) -> list[DetectedFace]:
        return [DetectedFace(box, source=self.name) for box in mask_boxes(self.mask)]


class MtcnnDetector(Detector):
    """MTCNN (Zhang et al. 2016, arXiv:1604.02878) from facenet-pytorch, whose weights come inside the package.

    Args:
        device: where the three small networks run (2 MB).
        threshold: lowest probability that counts as a face.
        min_face_size: smallest face looked for, in pixels of the shrunk photo.
    """

    name = MTCNN
    licence = "MIT, weights included in facenet-pytorch"
    INSTALL = "pip install facenet-pytorch==2.5.3"

    def __init__(self, device: str | torch.device = "cpu", threshold: float = 0.9, min_face_size: int = 20) -> None:
        try:
            from facenet_pytorch import MTCNN as Network
        except ImportError as error:
            raise DetectorUnavailable(
                f"the detector {MTCNN!r} needs the package facenet-pytorch ({error}); install it with"
                f' "{self.INSTALL}" (2.6.0 would replace PyTorch by an old release)'
            ) from error
        self.threshold = threshold
        self.min_face_size = min_face_size
        self.network = Network(keep_all=True, min_face_size=min_face_size, device=torch.device(device)).eval()

    def find(self, image: Tensor) -> list[DetectedFace]:
        if min(image.shape[:2]) < self.min_face_size:
            return []  # the pyramid of scales would be empty
        pixels = _to_bytes(image).to(self.network.device)
        try:
            boxes, probabilities, points = self.network.detect(pixels, landmarks=True)
        except IndexError as error:
            # facenet-pytorch drops candidates that fall outside the picture from one list and not from the other.
            raise FaceError(
                f"MTCNN failed on a photo of {image.shape[1]} × {image.shape[0]} pixels ({error});"
                " choose another detector, or give a box or a mask"
            ) from error
        if boxes is None:
            return []
        return [
            DetectedFace(
                box=box,
                confidence=float(probability),
                landmarks=torch.as_tensor(marks.astype("float32")),
                source=self.name,
            )
            for box, probability, marks in zip(boxes, probabilities, points, strict=True)
            if probability >= self.threshold and box[2] > box[0] and box[3] > box[1]
        ]


@dataclass(frozen=True)
class InsightFacePack:
    """A folder of InsightFace models: ``<root>/models/<name>``."""

    name: str
    path: Path


def find_insightface_packs(roots: Sequence[str | Path]) -> list[InsightFacePack]:
    """The model packs below the given InsightFace folders, preferred ones first.

    Args:
        roots: folders that hold ``models/<name>/*.onnx``, e.g. ``ComfyUI/models/insightface``.
    """
    packs: dict[str, InsightFacePack] = {}
    for root in roots:
        models = Path(root).expanduser() / "models"
        for folder in sorted(models.iterdir()) if models.is_dir() else []:
            # The archive of antelopev2 unpacks into antelopev2/antelopev2.
            for path in (folder, folder / folder.name):
                if path.is_dir() and any(path.glob("*.onnx")):
                    packs.setdefault(folder.name, InsightFacePack(folder.name, path.resolve()))
    rank = {name: index for index, name in enumerate(INSIGHTFACE_PACKS)}
    return sorted(packs.values(), key=lambda pack: (rank.get(pack.name, len(rank)), pack.name))


class InsightFaceDetector(Detector):
    """An InsightFace model pack through its own ``FaceAnalysis``.

    Args:
        pack: the folder of models.
        threshold: lowest score that counts as a face.
        recognition: also compute the identity vector of every face.
        device: ``"cpu"``, or ``"cuda"`` if onnxruntime offers it.
    """

    name = INSIGHTFACE
    licence = "code MIT; model packs for non-commercial research only"
    INSTALL = "pip install insightface onnxruntime"
    SIZES = (640, 320, 160)
    """Sides of the square the detector works on. A face that fills the photo is often found only at the smaller ones."""

    def __init__(
        self, pack: InsightFacePack, threshold: float = 0.5, recognition: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        self.detail = pack.name
        self.threshold = threshold
        modules = ["detection", "recognition"] if recognition else ["detection"]
        try:
            import onnxruntime
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise DetectorUnavailable(
                f'the detector {INSIGHTFACE!r} needs its packages ({error}); install them with "{self.INSTALL}"'
            ) from error
        cuda = "CUDAExecutionProvider"
        on_cuda = torch.device(device).type == "cuda" and cuda in onnxruntime.get_available_providers()
        self.context = 0 if on_cuda else -1
        try:
            # An absolute path as the name is used as it is, by 0.7 and by 2.x, and never looked for online.
            self.analysis = FaceAnalysis(
                name=str(pack.path),
                allowed_modules=modules,
                providers=[cuda, "CPUExecutionProvider"] if on_cuda else ["CPUExecutionProvider"],
            )
        except Exception as error:  # AssertionError, ConnectionError, and whatever onnxruntime has for broken files
            files = ", ".join(sorted(file.name for file in pack.path.glob("*.onnx"))) or "none"
            raise DetectorUnavailable(
                f"InsightFace cannot use the models in {pack.path} (.onnx files: {files}):"
                f" {str(error) or 'none of them is a face detector'} ({type(error).__name__})"
            ) from error
        if recognition and "recognition" not in self.analysis.models:
            raise DetectorUnavailable(f"the InsightFace models in {pack.path} hold no face recogniser")

    def find(self, image: Tensor) -> list[DetectedFace]:
        pixels = _to_bytes(image).numpy()[..., ::-1].copy()  # (H, W, 3) blue, green, red
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
        + f". Install one of them, choose {WHOLE_IMAGE!r} for photos that are cropped to the face already, or give boxes or a mask"
    )


def _choose_pack(roots: Sequence[str | Path], model: str | None) -> InsightFacePack:
    packs = find_insightface_packs(roots)
    chosen = [pack for pack in packs if model in (None, pack.name)]
    if not chosen:
        found = f"; found: {', '.join(pack.name for pack in packs)}" if packs else ""
        raise DetectorUnavailable(
            f"no InsightFace model files{f' named {model!r}' if model else ''}{found}; {_where_models_go(roots)}"
        )
    return chosen[0]


def _where_models_go(roots: Sequence[str | Path]) -> str:
    if not roots:
        return "no folder to look in was given"
    return "looked for *.onnx in " + ", ".join(str(Path(root) / "models" / "<name>") for root in roots)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def face_embedding(image: Tensor, *, insightface_roots: Sequence[str | Path], model: str | None = None) -> Tensor | None:
    """Identity vector ``(E,)`` of unit length of the largest face, or None if there is no face.

    The cosine of two of them measures the likeness.

    Raises:
        DetectorUnavailable: if InsightFace or its models are missing.
    """
    detector = load_detector(INSIGHTFACE, insightface_roots=insightface_roots, model=model, recognition=True)
    faces = detector.detect(image)
    return max(faces, key=lambda face: face.area).embedding if faces else None
