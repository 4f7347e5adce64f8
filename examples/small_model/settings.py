"""The settings of the small model: ``small.yaml``, and overrides behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.config import OptimiserSettings, TrainSettings
from trainer.config.fields import Count, NotNegative, Positive, PositiveFloat, Probability
from trainer.config.settings import Section, Settings

FILE = Path(__file__).with_name("small.yaml")
STAGES = ("autoencoder", "unet", "encoder", "masks", "eyes", "recogniser")
_LIST = Field(strict=False)  # YAML has lists
#: A few people and steps, to see that the build works.
QUICK = (
    "people.splits.train.identities=12",
    "people.splits.examiner.identities=12",
    "people.splits.heldout.identities=32",
    "pairs.identities=4",
    *(
        f"{name}=[train.steps=8, train.batch_size=4, train.checkpoint_every=2]"
        for name in (
            "adapter",
            *(f"variants.{one}" for one in ("face0", "face0-lora", "mixer", "mixer-text", "several")),
        )
    ),
    *(f"people.splits.{name}.identities=8" for name in ("heldout-equal", "second", "second-equal")),
    *(f"{stage}.{length}" for stage in STAGES for length in ("steps=6", "batch_size=4", "optimiser.warmup_steps=2")),
)


class Split(Section):
    """People that others never see."""

    number: Count
    """Seeds the people."""
    identities: Positive
    pictures: Positive
    """Of each person."""
    equal_colors: Annotated[tuple[str, str], _LIST] | None = None
    """Skin and hair that everybody has, as ``#rrggbb``; null leaves everybody their own."""


class Pairs(Section):
    """Pictures of two people of the split ``train`` side by side, in one scene: two squares wide."""

    identities: Annotated[int, Field(ge=2, multiple_of=2)]
    """The first so many people, two by two."""
    pictures: Positive
    """Of each two."""


class Complexion(Section):
    """Colours that go together, as ``#rrggbb``."""

    skin: list[str]
    hair: list[str]


class PeopleSettings(Section):
    """The drawn people."""

    size: Annotated[int, Field(ge=16, multiple_of=16)]
    """Side of the pictures and masks in pixels."""
    seed: int
    complexions: dict[str, Complexion]
    skin_jitter: NotNegative
    """How far a person's skin may lie from a colour of the palette, of 255 in each channel."""
    hair_jitter: NotNegative
    framings: dict[Literal["portrait", "close-up"], Annotated[tuple[float, float], _LIST]]
    """Least and largest size of a person, in 128ths of the picture's side for each unit of the drawing."""
    bottom: PositiveFloat
    """Units of the drawing from the middle of the head to the lower edge of the picture."""
    mouth_scale: PositiveFloat = 1.0
    """How much larger mouths are than the drawing has them."""
    splits: dict[str, Split]


class Stage(TrainSettings):
    """Length and optimiser of a stage; its output is a folder of the build."""

    output: str = ""
    ema: float = 0.995
    """Decay of the moving average of the weights, which is what the stage hands on."""
    checkpoint_every: Positive = 500
    keep: Positive = 1
    log_every: Positive = 50
    validate_every: None = None
    tracker: Literal["none"] = "none"
    optimiser: OptimiserSettings


class AutoencoderStage(Stage):
    """The autoencoder."""

    start: str | None = None
    """Folder of an autoencoder whose encoder stays as it is; null trains both halves from nothing."""


class UNetStage(Stage):
    """The U-Net and the text encoder."""

    start: str | None = None
    """Folder of a small model whose U-Net and text encoder go on learning; null begins anew."""
    widths: Annotated[tuple[int, ...], _LIST] = (128, 128)
    """Channels of each level. All levels have transformers, but for the first of three or more."""
    face_weight: PositiveFloat = 1.0
    """How much more the loss counts in the latent's cells that show head or hair."""
    pair_share: Probability = 0.0
    """Of the steps that see pictures of two people, half a batch each."""


class EncoderStage(Stage):
    """The face encoder."""

    start: str | None = None
    """Folder of a small model whose face encoder goes on learning; null begins anew."""
    patch: Positive = 8
    """Side of a patch of the crop in pixels; every patch is a face token."""
    recolored: Probability = 0.0
    """Share of the crops whose head and hair get another colour."""
    feature_weight: NotNegative = 0.0
    """Weight of the loss for telling the kinds of hair, nose, … beside who it is."""


class SmallModelSettings(Settings):
    """Everything the small model depends on but its adapter."""

    people: PeopleSettings
    crop: Positive
    """Side of a face crop in pixels."""
    pictures: Positive
    """How many of the training pictures the U-Net and the adapter see."""
    autoencoder: AutoencoderStage
    unet: UNetStage
    pairs: Pairs | None = None
    """null: the model knows squares alone."""
    encoder: EncoderStage
    adapter_start: str | None = None
    """Folder of a small model whose adapters go on learning; null begins anew."""
    adapter: list[str] = []
    """Overrides of ``adapter.yaml``, such as ``train.steps=4000``."""
    variants: dict[str, list[str]] = {}
    """In their place, those of a variant of the adapter."""
    trainings: Positive = 1
    """How often each variant of the adapter is trained, with other seeds."""
    masks: Stage
    eyes: Stage
    recogniser: Stage


def load(overrides: Sequence[str] = (), file: Path = FILE) -> SmallModelSettings:
    """The settings of a file, changed by overrides such as ``unet.steps=100``. Raises ``TrainerError``."""
    return SmallModelSettings.load(file, overrides)
