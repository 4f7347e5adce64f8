"""The settings of the losses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from .fields import NotNegative, PathText, PositiveFloat, Probability
from .settings import Section


class IdentityLossSettings(Section):
    """Likeness of the predicted clean picture's face to the references, as a frozen recogniser sees it. Off by default:
    each row it counts for is decoded, with a gradient."""

    weight: NotNegative = 0.0
    """Factor of 1 − cosine between the face of the predicted clean picture and its references."""
    contrastive: NotNegative = 0.0
    """Factor of the contrastive term: the face nearer to its own references than to the batch's other people's."""
    temperature: Annotated[float, Field(ge=0.001, le=10)] = 0.1
    """Of the contrastive term."""
    below: Probability = 0.25
    """Share of the timesteps, from the least noisy on, at which a row has these losses."""
    recogniser: Literal["encoder", "facenet"] = "encoder"
    """The adapter's own face encoder, or facenet-pytorch's InceptionResnetV1."""
    path: PathText | None = None
    """The weights of facenet, such as 20180402-114759-vggface2.pt; the encoder needs none."""

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        if self.active and (self.path is None) != (self.recogniser == "encoder"):
            found = "null" if self.path is None else f"{self.path!r:.80}"
            raise ValueError(
                f"loss.identity.path is {found} with recogniser {self.recogniser}: facenet needs a file of weights, "
                "the encoder none"
            )
        return self

    @property
    def active(self) -> bool:
        """Whether there is such a loss."""
        return (self.weight > 0 or self.contrastive > 0) and self.below > 0

    @property
    def sees_crops(self) -> bool:
        """Whether its recogniser looks at the references' crops, not at their hidden states."""
        return self.active and self.recogniser != "encoder"


class LossSettings(Section):
    """The loss and the conditions dropped from it. Every draw is made for each sample on its own."""

    kind: Literal["standard", "mask", "regularised"] = "regularised"
    """Everywhere; in the mask; or in the mask with the frozen model's own prediction outside it."""
    normalise: Literal["area", "average"] = "area"
    """Divide by the area of the mask, or average over all pixels as published."""
    standard_probability: Probability = 0.1
    """Share of samples trained with the standard loss."""
    face_dropout: Probability = 0.1
    """Share of samples whose face is dropped."""
    background_dropout: Probability = 0.1
    """Share of samples whose background is dropped, with adapter.background."""
    text_dropout: Probability = 0.1
    """Share of samples whose caption is replaced by the empty one."""
    image_token_weight: NotNegative = 1.0
    """For UniDiffuser: how much a value of the CLIP image token counts beside one of the picture; published: 0."""
    identity: IdentityLossSettings = IdentityLossSettings()
    min_snr_gamma: PositiveFloat | None = None
    """Min-SNR weighting of timesteps (Hang et al. 2023); null weighs all timesteps the same."""
