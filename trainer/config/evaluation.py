"""The settings of ``python -m trainer.evaluate``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from .fields import Count, Device, PathText, Positive, Seed
from .preparation import DetectSettings
from .sampling import SamplingSettings, Side
from .settings import Settings
from .training import MAX_REFERENCES, ModelSettings

QUICK = {"most_people": 3, "most_prompts": 2, "unmodified": 4, "sampling.steps": 8}
"""What ``--quick`` puts in place of defaults."""


class EvaluatedModel(ModelSettings):
    """The base model that the pictures are drawn with; not needed where all pictures were made elsewhere."""

    base: PathText | None = None
    """A single-file checkpoint (.safetensors, .ckpt) or diffusers folder; with allow_hub also a hub name."""


class DrawingSettings(SamplingSettings):
    """How the pictures are drawn: the defaults are the published ones, but for the sampler, which is DDIM here."""

    steps: Annotated[int, Field(gt=0, le=1000)] = 40
    """Denoising steps."""
    size: Side | None = None
    """Side of the pictures in pixels; null takes the resolution that the adapter's file names."""
    strength: Annotated[float, Field(ge=0, le=100)] | None = None
    """Factor of the branches' output; null takes the one that the adapter's file names."""
    batch_size: Annotated[int, Field(gt=0, le=4096)] = 4
    """Pictures of a person that are drawn at once."""
    combination: Literal["concat", "average"] | None = None
    """How several references become one context; null takes what the adapter was trained with."""


class EvaluateSettings(Settings):
    """Everything that an evaluation depends on."""

    people: PathText
    """People × prompts in a file of the queue's formats (JSON, JSONL, CSV, or the published one), a folder of such
    files, a manifest of trainer.prepare, or a folder of photos: PPR10K as it comes, or a sub-folder a person."""
    output: PathText
    """Folder of the pictures, tables and plots."""
    photos: PathText | None = None
    """Folder of the photos that the file names; null is that of the file."""
    prompts: PathText | None = None
    """A text file with a prompt a line, for people that come without; it replaces those that they come with."""
    adapter: PathText | None = None
    """An adapter file, or a run's folder or a checkpoint in it, whose adapter is exported first."""
    encoder: PathText | None = None
    """Folder of the adapter's face encoder, if its file does not include it or it has moved since training."""
    pictures: PathText | None = None
    """Pictures that were made elsewhere: the output folder of python run.py queue, or <person>_<number>.png."""
    unmodified_pictures: PathText | None = None
    """The same for pictures of the model without the adapter; null draws them if there is a model.base."""
    missing: Literal["stop", "skip"] = "stop"
    """What to do about pictures that are not in the folder."""
    model: EvaluatedModel = EvaluatedModel()
    sampling: DrawingSettings = DrawingSettings()
    detect: DetectSettings = DetectSettings()
    recogniser: Literal["auto", "insightface", "dlib", "encoder"] = "auto"
    """Compares faces: auto is InsightFace if its models are there, else dlib. encoder is the adapter's own: it has seen
    the references, so it says little of likeness."""
    clip: PathText | None = None
    """Folder of a transformers CLIPModel with its tokenizer, for CLIP's similarities; the published ones are of
    openai/clip-vit-base-patch32 or -large-patch14."""
    image_reward: PathText | None = None
    """Folder with ImageReward.pt and med_config.json, for the package image-reward."""
    most_people: Positive = 36
    """Further people are left out."""
    most_prompts: Annotated[int, Field(gt=0, le=1000)] = 8
    """Further prompts of a person are left out."""
    most_photos: Annotated[int, Field(gt=0, le=1000)] = 20
    """Further photos of a person are left out."""
    references: Annotated[int, Field(gt=0, le=1000)] = MAX_REFERENCES
    """Photos of a person that the adapter sees, the first ones with a face; at most as many as it was trained with."""
    unmodified: Count = 20
    """Pictures of the unmodified model for each person, at least one for each prompt; 0 draws none."""
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=1000)] = [0]
    """Each prompt once with each, where the file names none."""
    bootstrap: Annotated[int, Field(ge=100, le=10**5)] = 2000
    """Draws of people for the intervals."""
    device: Device = "cpu"
    """Where the model and CLIP run; the detector's is detect.device."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.pictures is None and (self.adapter is None or self.model.base is None):
            raise ValueError(
                "nothing to evaluate: give adapter and model.base, which draw the pictures, or a folder with pictures"
            )
        if self.recogniser == "encoder" and self.adapter is None:
            raise ValueError("recogniser=encoder is the adapter's: give adapter")
        return self
