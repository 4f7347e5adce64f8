"""The settings of ``python -m trainer.prepare``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .settings import Count, NotNegative, Positive, Probability, Section, Settings


class DetectSettings(Section):
    """The face detector; a table that gives boxes makes it unnecessary."""

    detector: Literal["auto", "insightface", "mtcnn", "whole image"] = "auto"
    """auto is InsightFace if its models are there, else MTCNN."""
    insightface_roots: list[str] = ["models/insightface", "~/.insightface"]
    """Folders that hold models/<pack>/*.onnx."""
    model: str | None = None
    """InsightFace model pack; null takes the best one there is."""
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest confidence of a face; null is 0.9 for MTCNN and 0.5 for InsightFace."""
    device: str = "cpu"


class FilterSettings(Section):
    """Which photos are kept: those with exactly one recognisable face."""

    minimum_face: Positive = 48
    """Smallest longer side of the face box, in pixels of the photo."""
    ignore_below: Probability = 0.35
    """Other faces smaller than this share of the largest are background, not a second person."""
    minimum_sharpness: NotNegative = 0.05
    """Smallest variance of the Laplacian over that of the face; sharp ones have 0.2 to 0.7, 0 keeps all."""


class CropSettings(Section):
    """The square face crop."""

    scale: Annotated[float, Field(ge=1)] = 1.1
    """Side of the square over the longer side of the box."""
    border: Literal["pad", "clamp"] = "pad"
    """A square that reaches past the border is padded, or moved and shrunk until it lies inside."""
    size: Positive = 224
    """Side of the saved crop in pixels: the encoder's image size saves cutting it again."""


class MaskSettings(Section):
    """The mask of face and hair, for the loss."""

    parser: Literal["auto", "facer", "ellipse"] = "auto"
    """auto is Facer if its model is there, else an ellipse from the landmarks."""
    parser_roots: list[str] = ["models/facer", "~/.cache/torch/hub/checkpoints"]
    """Folders that hold face_parsing.farl.lapa*.pt."""
    device: str = "cpu"


class CaptionSettings(Section):
    """Captions come with the photos (a table, or a .txt file beside each), or from a model."""

    model: str | None = None
    """Folder of a transformers image-to-text model, for photos without a caption."""
    prompt: str | None = None
    """Text that the model goes on from, for models that take one."""
    most_tokens: Positive = 60
    """Longest caption of the model."""
    missing: Literal["keep", "drop"] = "keep"
    """What happens to photos that have no caption in the end."""
    device: str = "cpu"


class IdentitySettings(Section):
    """Who is in the photo; retrieval needs to know."""

    source: Literal["auto", "given", "pattern", "folder", "cluster", "none"] = "auto"
    """auto: as given, else by pattern if there is one, else the sub-folder as far as a recogniser finds one person in
    it. folder: the sub-folder, whoever is in it."""
    pattern: str | None = None
    """Regular expression on the file name whose first group is the person, such as '(.+)_\\d+'."""
    recogniser: Literal["auto", "insightface", "dlib"] = "auto"
    """Compares faces: InsightFace if its models are there, else dlib."""
    distance: Annotated[float, Field(gt=0, le=2)] | None = None
    """Largest mean distance within one person; null is the recogniser's own."""


class PrepareSettings(Settings):
    """Everything that preparing photos depends on."""

    photos: str
    """A folder (with sub-folders), a glob, or a CSV, JSONL or Parquet table with path, caption and identity."""
    output: str
    """Folder of the manifest, masks and crops."""
    detect: DetectSettings = DetectSettings()
    filter: FilterSettings = FilterSettings()
    crop: CropSettings = CropSettings()
    mask: MaskSettings = MaskSettings()
    caption: CaptionSettings = CaptionSettings()
    identity: IdentitySettings = IdentitySettings()
    manifest: Literal["jsonl", "parquet"] = "jsonl"
    """Format of the manifest."""
    workers: Count = 0
    """Processes that work on photos side by side; 0 works in this one."""
    batch_size: Positive = 8
    """Photos that go through the stages together."""
    sheet: Count = 64
    """Photos on the contact sheet; 0 makes none."""
