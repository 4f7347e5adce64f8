"""The settings of the small model: ``small.yaml``, and overrides behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trainer.config import OptimiserSettings, TrainSettings
from trainer.config.settings import Count, NotNegative, Positive, Section, Settings

FILE = Path(__file__).with_name("small.yaml")
#: A few people and steps, to see that the build works.
QUICK = (
    "people.splits.train.identities=12",
    "people.splits.heldout.identities=32",
    *(f"{stage}.steps=6" for stage in ("autoencoder", "unet", "encoder", "masks", "recogniser")),
    *(f"{stage}.batch_size=4" for stage in ("autoencoder", "unet", "encoder", "masks", "recogniser")),
)


class Split(Section):
    """People that others never see."""

    number: Count
    """Seeds the people."""
    identities: Positive
    pictures: Positive
    """Of each person."""


class PeopleSettings(Section):
    """The drawn people."""

    size: Annotated[int, Field(ge=16, multiple_of=16)]
    """Side of the pictures and masks in pixels."""
    seed: int
    skin_jitter: NotNegative
    """How far a person's skin may lie from a colour of the palette, of 255 in each channel."""
    hair_jitter: NotNegative
    splits: dict[str, Split]


class Stage(Section):
    """Length and optimiser of a stage."""

    steps: Positive
    batch_size: Positive
    seed: int = 0
    ema: float = 0.995
    """Decay of the moving average of the weights, which is what the stage hands on."""
    optimiser: OptimiserSettings

    def train(self, output: Path) -> TrainSettings:
        """As settings of the trainer."""
        return TrainSettings(
            output=str(output),
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            ema=self.ema,
            checkpoint_every=500,
            keep=1,
            log_every=50,
            validate_every=None,
            tracker="none",
        )


class SmallModelSettings(Settings):
    """Everything the small model depends on but its adapter."""

    people: PeopleSettings
    crop: Positive
    """Side of a face crop in pixels."""
    pictures: Positive
    """How many of the training pictures the U-Net and the adapter see."""
    autoencoder: Stage
    unet: Stage
    encoder: Stage
    masks: Stage
    recogniser: Stage


def load(overrides: Sequence[str] = ()) -> SmallModelSettings:
    """The settings of ``small.yaml``, changed by overrides such as ``unet.steps=100``. Raises ``TrainerError``."""
    return SmallModelSettings.load(FILE, overrides)
