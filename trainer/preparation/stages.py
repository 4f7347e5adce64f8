"""The stages: face and crop, mask, writing. Captions: :mod:`.captions`; who is in the photo: :mod:`.recognise`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from feedface_core.errors import FeedFaceError
from feedface_core.faces import FILL, DetectedFace, clamp_square, load_detector, resample, square_box
from feedface_core.files.atomic import replacing

from ..config.preparation import CropSettings, DetectSettings, FilterSettings, MaskSettings
from ..data import pictures
from ..errors import TrainerError
from .masks import FACER_FILES, face_mask, load_parser
from .photo import Batch, Drop, Photo, Stage

SHARPNESS_SIDE = 48
"""Sharpness is judged at this size, which even a small face has: at its own, size and sharpness would mix."""


class FindFace(Stage):
    """Opens a photo upright, finds its one recognisable face, and cuts the square around it.

    Args:
        settings: of the detector; None if every photo comes with its box.
        keep: which photos are kept.
        crop: how the square is cut.

    Raises:
        FeedFaceError: a detector that is not there.
    """

    def __init__(self, settings: DetectSettings | None, keep: FilterSettings, crop: CropSettings) -> None:
        self.keep, self.crop, self.detector = keep, crop, None
        if settings is not None:
            self.detector = load_detector(
                settings.detector,
                insightface_roots=settings.insightface_roots,
                model=settings.model,
                threshold=settings.threshold,
                device=settings.device,
            )

    def process(self, photo: Photo) -> None:
        open_photo(photo)
        box = photo.given.get("bbox")
        try:
            given = [box, *(face["bbox"] for face in photo.given.get("faces", ()))]
            faces = (
                self.detector.detect(photo.image)
                if box is None
                else [DetectedFace(one, source="given") for one in given]
            )
        except FeedFaceError as error:
            raise Drop("unreadable photo" if box is None else "bad face box", str(error)) from error
        choose_face(photo, faces, self.keep)
        cut_crops(photo, self.crop)


def open_photo(photo: Photo) -> None:
    """Fills ``picture``, and the columns of its size and perceptual hash."""
    if not photo.path.is_file():
        raise Drop("not a file" if photo.path.exists() else "missing file", str(photo.path))
    if photo.path.stat().st_size == 0:
        raise Drop("empty file", "")
    try:
        photo.picture = pictures.open_photo(photo.path)
    except (FeedFaceError, MemoryError) as error:
        raise Drop("unreadable photo", str(error).removeprefix(f"{photo.path}: ")) from error
    photo.row["width"], photo.row["height"] = photo.picture.size
    photo.row["photo_hash"] = f"{pictures.perceptual_hash(photo.picture):016x}"


def choose_face(photo: Photo, faces: Sequence[DetectedFace], settings: FilterSettings) -> None:
    """Fills ``face`` and ``others`` if there are not too many recognisable faces, and these are large and sharp
    enough."""
    if not faces:
        raise Drop("no face", "")
    face, *others = faces
    if face.source != "given":  # given ones are all meant, in the order of the table
        face, *others = sorted(faces, key=lambda face: -face.size)
        others = [one for one in others if one.size >= settings.ignore_below * face.size]
    if 1 + len(others) > settings.people:
        sizes = [f"{one.size:.0f}" for one in (face, *others)]
        raise Drop("several faces", f"{len(sizes)}, of {', '.join(sizes)} pixels")
    value = check_face(photo, face, settings)
    for one in others:
        check_face(photo, one, settings)
    photo.face, photo.others = face, others
    photo.row |= {
        "bbox": [round(value, 2) for value in face.box],
        "detector": face.source,
        "confidence": round(face.confidence, 4),
        "sharpness": round(value, 3),
    }
    if others:
        photo.row["faces"] = [{"bbox": [round(value, 2) for value in one.box]} for one in others]


def check_face(photo: Photo, face: DetectedFace, settings: FilterSettings) -> float:
    """The sharpness of a face. Raises :class:`Drop` for one that is too small, not sharp enough or not in the photo."""
    if face.size < settings.minimum_face:
        raise Drop("small face", f"{face.size:.0f} pixels, wanted {settings.minimum_face}")
    x0, y0, x1, y1 = face.box
    if x1 <= 0 or y1 <= 0 or x0 >= photo.row["width"] or y0 >= photo.row["height"]:
        raise Drop("bad face box", f"{face.box} lies outside the photo")
    value = sharpness(resample(photo.image, face.box, SHARPNESS_SIDE, SHARPNESS_SIDE))
    if value < settings.minimum_sharpness:
        raise Drop("blurred face", f"sharpness {value:.3f}, wanted {settings.minimum_sharpness:g}")
    return value


def sharpness(image: Tensor) -> float:
    """Variance of the Laplacian over the variance of the grey values, of ``(H, W, 3)`` in 0…1.

    Without the second, a face in the dark would count as blurred. Portraits at 48 pixels have 0.2 to 0.7; blurred by a
    hundredth of the face's size 0.1 to 0.3, by a fiftieth 0.03 to 0.1.
    """
    grey = 255 * (image @ torch.tensor([0.299, 0.587, 0.114]))  # (H, W)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    edges = functional.conv2d(grey[None, None], kernel[None, None])
    return (edges.var() / (grey.var() + 1.0)).item()


def cut_crops(photo: Photo, settings: CropSettings) -> None:
    """Fills ``crop`` and ``crops`` with the squares around the faces, and the columns that say how they were cut."""
    photo.crop, columns = cut_crop(photo, photo.face, settings)
    photo.row |= columns | {"crop_scale": settings.scale, "crop_border": settings.border, "crop_fill": FILL}
    for number, face in enumerate(photo.others):
        crop, columns = cut_crop(photo, face, settings)
        photo.crops.append(crop)
        photo.row["faces"][number] |= columns


def cut_crop(photo: Photo, face: DetectedFace, settings: CropSettings) -> tuple[Tensor, dict[str, Any]]:
    """The square around a face, and its columns."""
    square = square_box(face.box, settings.scale)
    if settings.border == "clamp":
        square = clamp_square(square, *photo.picture.size)
    crop = resample(photo.image, square, settings.size, settings.size)
    digest = pictures.perceptual_hash(pictures.to_picture(crop))
    return crop, {"square_bbox": [round(value, 2) for value in square], "crop_hash": f"{digest:016x}"}


class Mask(Stage):
    """The mask of face and hair: the one that came with the photo, Facer's, or an ellipse.

    Args:
        settings: of the parser.
        folder: that paths of given masks are relative to.

    Raises:
        TrainerError: Facer is asked for and not there.
    """

    def __init__(self, settings: MaskSettings, folder: Path) -> None:
        self.folder, self.parser = folder, None
        if settings.parser != "ellipse":
            self.parser = load_parser(settings.parser_roots, settings.device)
        if settings.parser == "facer" and self.parser is None:
            raise TrainerError(
                f"mask.parser=facer, but there is no {FACER_FILES} (or no package pyfacer); looked in "
                + ", ".join(settings.parser_roots)
            )

    def process(self, photo: Photo) -> None:
        given = photo.given.get("mask_path")
        try:
            if given:
                mask, kind = pictures.read_mask(self.folder / Path(given).expanduser(), photo.picture.size), "given"
            else:
                mask, kind = face_mask(photo.image, photo.face, self.parser)
                for face in photo.others:
                    mask = torch.maximum(mask, face_mask(photo.image, face, self.parser)[0])
        except FeedFaceError as error:
            raise Drop("unreadable mask" if given else "no mask", str(error)) from error
        photo.mask = mask > 0.5
        covered = photo.mask.float().mean().item()
        if covered in (0.0, 1.0):
            kind, which = ("full", "every") if covered else ("empty", "no")
            raise Drop(f"{kind} mask", f"{which} pixel belongs to the face")
        photo.row |= {"mask_kind": kind, "mask_area": round(covered, 4)}


class Write(Stage):
    """Writes mask and crop beside the manifest, each in one piece, and forgets the pixels."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def __call__(self, batch: Batch) -> Batch:
        for photo in super().__call__(batch):
            photo.picture = photo.face = photo.crop = photo.mask = None
            photo.others, photo.crops = [], []
        return batch

    def process(self, photo: Photo) -> None:
        photo.row["mask_path"] = self._write("masks", photo.mask.float())
        photo.row["crop_path"] = self._write("crops", photo.crop)
        for number, crop in enumerate(photo.crops):
            photo.row["faces"][number]["crop_path"] = self._write("crops", crop)

    def _write(self, folder: str, image: Tensor) -> str:
        """Write a picture, and return its path from the output folder.

        The name is a hash of the file's contents: two photos share a file only if it is the same. The first two
        digits are a folder, so that none of the 256 holds more than a few thousand of a million photos.
        """
        encoded = BytesIO()
        pictures.to_picture(image).save(encoded, format="PNG")
        digest = hashlib.blake2b(encoded.getvalue(), digest_size=16).hexdigest()
        name = f"{folder}/{digest[:2]}/{digest}.png"
        target = self.output / name
        if not target.is_file() or target.stat().st_size != len(encoded.getvalue()):
            with replacing(target) as partial:
                partial.write_bytes(encoded.getvalue())
        return name
