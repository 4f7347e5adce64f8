"""The stages that look at one photo: read, detect, filter, crop, mask, write."""

from __future__ import annotations

import hashlib
import os
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from feedface_core.faces import FILL, DetectedFace, FaceError, clamp_square, load_detector, resample, square_box
from trainer.preparation.masks import face_mask, load_parser

from ..config.preparation import CropSettings, DetectSettings, FilterSettings, MaskSettings
from ..data import pictures
from .photo import Drop, Photo, Stage

SHARPNESS_SIDE = 48
"""Sharpness is judged at this size, which even a small face has: at its own, size and sharpness would mix."""


class Read(Stage):
    """Opens the photo, upright, and notes its size and perceptual hash."""

    def process(self, photo: Photo) -> None:
        if not photo.path.is_file():
            raise Drop("missing file", str(photo.path))
        if photo.path.stat().st_size == 0:
            raise Drop("empty file")
        try:
            photo.picture = pictures.open_photo(photo.path)
        except (FaceError, MemoryError) as error:
            raise Drop("unreadable photo", str(error).removeprefix(f"{photo.path}: ")) from error
        photo.row["width"], photo.row["height"] = photo.picture.size
        photo.row["photo_hash"] = f"{pictures.perceptual_hash(photo.picture):016x}"


class Detect(Stage):
    """Finds the faces, or takes the box that came with the photo.

    Args:
        settings: of the detector; None if every photo comes with its box.
    """

    def __init__(self, settings: DetectSettings | None) -> None:
        self.detector = None
        if settings is not None:
            self.detector = load_detector(
                settings.detector,
                insightface_roots=settings.insightface_roots,
                model=settings.model,
                threshold=settings.threshold,
                device=settings.device,
            )

    def process(self, photo: Photo) -> None:
        box = photo.given.get("bbox")
        try:
            if box is None:
                photo.faces = self.detector.detect(photo.image)
            else:
                photo.faces = [DetectedFace(tuple(box), source="given")]
        except (FaceError, TypeError) as error:
            raise Drop("bad face box" if box is not None else "unreadable photo", str(error)) from error


class Filter(Stage):
    """Keeps photos with exactly one recognisable face that is large and sharp enough.

    Sharpness is the variance of the Laplacian over that of the grey values, of the face at 48 pixels. Portraits have
    0.2 to 0.7; blurred by a hundredth of the face's size 0.1 to 0.3, by a fiftieth 0.03 to 0.1.
    """

    def __init__(self, settings: FilterSettings) -> None:
        self.settings = settings

    def process(self, photo: Photo) -> None:
        if not photo.faces:
            raise Drop("no face")
        ordered = sorted(photo.faces, key=lambda face: -face.size)
        largest = ordered[0]
        others = [face for face in ordered[1:] if face.size >= self.settings.ignore_below * largest.size]
        if others:
            sizes = ", ".join(f"{face.size:.0f}" for face in (largest, *others))
            raise Drop("several faces", f"{len(others) + 1}, of {sizes} pixels")
        if largest.size < self.settings.minimum_face:
            raise Drop("small face", f"{largest.size:.0f} pixels, wanted {self.settings.minimum_face}")
        x0, y0, x1, y1 = largest.box
        if x1 <= 0 or y1 <= 0 or x0 >= photo.row["width"] or y0 >= photo.row["height"]:
            raise Drop("bad face box", f"{largest.box} lies outside the photo")
        value = sharpness(resample(photo.image, largest.box, SHARPNESS_SIDE, SHARPNESS_SIDE))
        if value < self.settings.minimum_sharpness:
            raise Drop("blurred face", f"sharpness {value:.3f}, wanted {self.settings.minimum_sharpness:g}")
        photo.face = largest
        photo.row |= {
            "bbox": [round(value, 2) for value in largest.box],
            "detector": largest.source,
            "confidence": round(largest.confidence, 4),
            "sharpness": round(value, 3),
        }


def sharpness(image: Tensor) -> float:
    """Variance of the Laplacian over the variance of the grey values, of ``(H, W, 3)`` in 0…1.

    Without the second, a face in the dark would count as blurred.
    """
    grey = 255 * (image @ torch.tensor([0.299, 0.587, 0.114]))  # (H, W)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    edges = functional.conv2d(grey[None, None], kernel[None, None])
    return (edges.var() / (grey.var() + 1.0)).item()


class Crop(Stage):
    """Cuts the square around the face."""

    def __init__(self, settings: CropSettings) -> None:
        self.settings = settings

    def process(self, photo: Photo) -> None:
        width, height = photo.picture.size
        square = square_box(photo.face.box, self.settings.scale)
        if self.settings.border == "clamp":
            square = clamp_square(square, width, height)
        photo.crop = resample(photo.image, square, self.settings.size, self.settings.size)
        photo.row |= {
            "square_bbox": [round(value, 2) for value in square],
            "crop_scale": self.settings.scale,
            "crop_border": self.settings.border,
            "crop_fill": FILL,
        }
        photo.row["crop_hash"] = f"{pictures.perceptual_hash(pictures.to_picture(photo.crop)):016x}"


class Mask(Stage):
    """The mask of face and hair: the one that came with the photo, Facer's, or an ellipse."""

    def __init__(self, settings: MaskSettings, folder: Path) -> None:
        self.parser = None
        self.folder = folder
        if settings.parser != "ellipse":
            self.parser = load_parser(settings.parser_roots, settings.device)
            if self.parser is None and settings.parser == "facer":
                places = ", ".join(settings.parser_roots)
                raise FaceError(
                    "mask.parser=facer, but there is no face_parsing.farl.lapa*.pt (or no package pyfacer); "
                    f"looked in {places}"
                )

    def process(self, photo: Photo) -> None:
        given = photo.given.get("mask_path")
        try:
            if given:
                photo.mask = pictures.read_mask(self.folder / Path(given).expanduser(), photo.picture.size)
                kind = "given"
            else:
                photo.mask, kind = face_mask(photo.image, photo.face, self.parser)
        except FaceError as error:
            raise Drop("unreadable mask" if given else "no mask", str(error)) from error
        photo.mask = photo.mask > 0.5
        covered = photo.mask.float().mean().item()
        if covered == 0.0:
            raise Drop("empty mask", "no pixel belongs to the face")
        if covered == 1.0:
            raise Drop("full mask", "every pixel belongs to the face")
        photo.row |= {"mask_kind": kind, "mask_area": round(covered, 4)}


class Write(Stage):
    """Writes mask and crop beside the manifest, each in one piece, and forgets the pixels."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def __call__(self, batch: list[Photo]) -> list[Photo]:
        return [photo.release() for photo in super().__call__(batch)]

    def process(self, photo: Photo) -> None:
        photo.row["mask_path"] = self._write("masks", photo.mask.float())
        photo.row["crop_path"] = self._write("crops", photo.crop)

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
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            partial.write_bytes(encoded.getvalue())
            os.replace(partial, target)
        return name
