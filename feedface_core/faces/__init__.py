"""From photos to face crops: detection, choice of the face, crop, mask and preview.

Importing this needs torch and numpy only; Pillow, SciPy and the detectors' packages are imported when they
are used.
"""

from .crops import (
    CROP_SCALE,
    CROP_SIZE,
    FILL,
    check_image,
    clamp_square,
    crop_face,
    crop_faces,
    image_from_pil,
    load_image,
    mask_boxes,
    resample,
    square_box,
)
from .detector_base import Detector, DetectorUnavailable, GivenBoxes, GivenMask, WholeImage, shrink
from .detector_models import find_insightface_packs
from .detectors import AUTO, DETECTOR_NAMES, detector_status, face_embedding, load_detector
from .face import (
    Box,
    DetectedFace,
    FaceError,
    FaceIndexError,
    NoFaceError,
    check_box,
    faces_from_json,
    faces_to_json,
)
from .parsing import (
    FaceParser,
    FacerParser,
    ellipse_mask,
    face_mask,
    find_parser_file,
    head_ellipse,
    load_parser,
)
from .preview import draw_faces
from .selection import (
    ORDERS,
    WHEN_NONE,
    Selection,
    crop_scale_of,
    order_faces,
    parse_indexes,
    select_faces,
    select_from_photo,
)

__all__ = [
    "AUTO",
    "CROP_SCALE",
    "CROP_SIZE",
    "DETECTOR_NAMES",
    "FILL",
    "ORDERS",
    "WHEN_NONE",
    "Box",
    "DetectedFace",
    "Detector",
    "DetectorUnavailable",
    "FaceError",
    "FaceIndexError",
    "FaceParser",
    "FacerParser",
    "GivenBoxes",
    "GivenMask",
    "NoFaceError",
    "Selection",
    "WholeImage",
    "check_box",
    "check_image",
    "clamp_square",
    "crop_face",
    "crop_faces",
    "crop_scale_of",
    "detector_status",
    "draw_faces",
    "ellipse_mask",
    "face_embedding",
    "face_mask",
    "faces_from_json",
    "faces_to_json",
    "find_insightface_packs",
    "find_parser_file",
    "head_ellipse",
    "image_from_pil",
    "load_detector",
    "load_image",
    "load_parser",
    "mask_boxes",
    "order_faces",
    "parse_indexes",
    "resample",
    "select_faces",
    "select_from_photo",
    "shrink",
    "square_box",
]
