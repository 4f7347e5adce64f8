"""From photos to face crops: detection, choice of the face, crop and preview.

Importing this needs torch and numpy only; Pillow, SciPy and the detectors' packages are imported when they are used.
"""

from .box import Box, DetectedFace, NoFaceError, check_box, faces_from_json, faces_to_json
from .crop import (
    CROP_SCALE,
    CROP_SIZE,
    FILL,
    check_image,
    clamp_square,
    crop_face,
    cut_squares,
    image_from_pil,
    load_image,
    mask_boxes,
    resample,
    square_box,
)
from .detectors import AUTO, DETECTOR_NAMES, load_detector
from .detectors.base import Detector, DetectorUnavailable, GivenBoxes, GivenMask, WholeImage, shrink
from .detectors.insightface import find_insightface_packs
from .preview import draw_faces
from .select import ORDERS, WHEN_NONE, Selection, crop_scale_of, order_faces, parse_indexes, select_from_photo
