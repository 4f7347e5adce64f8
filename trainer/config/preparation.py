"""The settings of ``python -m trainer.prepare``."""

from __future__ import annotations

from typing import Annotated, Literal

import regex
from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from feedface_core.errors import shorten

from .fields import MOST_FACES, Device, NotNegative, PathText, Positive, Probability, Text
from .settings import Section, Settings


def _pattern(text: str) -> str:
    try:
        groups = regex.compile(text).groups
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{shorten(text)}: not a regular expression ({error})") from error
    if groups < 1:
        raise ValueError(f"{shorten(text)}: needs a group that is the person, such as '(.+)_\\d+'")
    return text


Pattern = Annotated[Text, Field(max_length=1000), AfterValidator(_pattern)]
Folders = Annotated[list[PathText], Field(max_length=100)]


class DetectSettings(Section):
    """The face detector; a table that gives boxes makes it unnecessary."""

    detector: Literal["auto", "insightface", "mtcnn", "whole image"] = "auto"
    """auto is InsightFace if its models are there, else MTCNN."""
    insightface_roots: Folders = ["models/insightface", "~/.insightface"]
    """Folders that hold models/<pack>/*.onnx."""
    model: Text | None = None
    """InsightFace model pack; null takes the best one there is."""
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest confidence of a face; null is 0.9 for MTCNN and 0.5 for InsightFace."""
    device: Device = "cpu"


class FilterSettings(Section):
    """Which photos are kept: those with exactly one recognisable face, or with up to so many people."""

    people: Annotated[int, Field(ge=1, le=MOST_FACES)] = 1
    """Most people in a photo. With 2 and more, photos of several are kept: a row has all their faces, and training
    shows each region of the picture the references of its own person."""

    minimum_face: Positive = 48
    """Smallest longer side of the face box, in pixels of the photo."""
    ignore_below: Probability = 0.35
    """Other faces smaller than this share of the largest are background, not a second person."""
    minimum_sharpness: NotNegative = 0.05
    """Smallest variance of the Laplacian over that of the face; sharp ones have 0.2 to 0.7, 0 keeps all."""


class CropSettings(Section):
    """The square face crop."""

    scale: Annotated[float, Field(ge=1, le=16)] = 1.1
    """Side of the square over the longer side of the box."""
    border: Literal["pad", "clamp"] = "pad"
    """A square that reaches past the border is padded, or moved and shrunk until it lies inside."""
    size: Annotated[int, Field(ge=16, le=4096)] = 224
    """Side of the saved crop in pixels: the encoder's image size saves cutting it again."""


class MaskSettings(Section):
    """The mask of face and hair, for the loss."""

    parser: Literal["auto", "facer", "ellipse"] = "auto"
    """auto is Facer if its model is there, else an ellipse from the landmarks."""
    parser_roots: Folders = ["models/facer", "~/.cache/torch/hub/checkpoints"]
    """Folders that hold face_parsing.farl.lapa*.pt."""
    device: Device = "cpu"


class CaptionSettings(Section):
    """Captions come with the photos (a table, or a .txt file beside each), or from a model."""

    model: PathText | None = None
    """Folder of a transformers image-to-text model, for photos without a caption."""
    backend: Literal["auto", "transformers", "vllm"] = "auto"
    """What runs the model. auto is vLLM with caption.device=cuda, if it is installed (pip install 'feedface[vllm]') and
    knows the model, else transformers; the log says which."""
    prompt: Text | None = None
    """Text that the model goes on from, for models that take one."""
    most_tokens: Annotated[int, Field(gt=0, le=10_000)] = 60
    """Longest caption of the model."""
    missing: Literal["keep", "drop"] = "keep"
    """What happens to photos that have no caption in the end."""
    device: Device = "cpu"
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the GPU's memory that vLLM takes; the detector and the parser may need the rest."""
    max_model_len: Positive | None = None
    """Most tokens of picture, prompt and caption in vLLM; null is as many as the model was made for."""


class IdentitySettings(Section):
    """Who is in the photo; retrieval needs to know."""

    source: Literal["auto", "given", "pattern", "folder", "cluster", "none"] = "auto"
    """auto: as given, else by pattern if there is one, else the sub-folder as far as a recogniser finds one person in
    it. folder: the sub-folder, whoever is in it."""
    pattern: Pattern | None = None
    """Regular expression on the file name whose first group is the person, such as '(.+)_\\d+'."""
    recogniser: Literal["auto", "insightface", "dlib"] = "auto"
    """Compares faces: InsightFace if its models are there, else dlib."""
    distance: Annotated[float, Field(gt=0, le=2)] | None = None
    """Largest mean distance within one person; null is the recogniser's own."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.source == "pattern" and self.pattern is None:
            raise ValueError("identity.source=pattern needs a group that is the person in identity.pattern")
        return self


class PrepareSettings(Settings):
    """Everything that preparing photos depends on."""

    photos: PathText
    """A folder (with sub-folders), a glob, or a CSV, JSONL or Parquet table with path, caption and identity."""
    output: PathText
    """Folder of the manifest, masks and crops."""
    detect: DetectSettings = DetectSettings()
    filter: FilterSettings = FilterSettings()
    crop: CropSettings = CropSettings()
    mask: MaskSettings = MaskSettings()
    caption: CaptionSettings = CaptionSettings()
    identity: IdentitySettings = IdentitySettings()
    consent: Text = ""
    """A note on the consent of the people, for photos whose table has none in a column ``consent``."""
    manifest: Literal["jsonl", "parquet"] = "jsonl"
    """Format of the manifest."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that work on photos side by side; 0 works in this one."""
    runner: Literal["processes", "ray"] = "processes"
    """Who runs them: this machine, or Ray Data (pip install 'feedface[ray]'; RAY_ADDRESS names a cluster)."""
    batch_size: Annotated[int, Field(gt=0, le=4096)] = 8
    """Photos that go through the stages together."""
    sheet: Annotated[int, Field(ge=0, le=1000)] = 64
    """Photos on the contact sheet; 0 makes none."""
