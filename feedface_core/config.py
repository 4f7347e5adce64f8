"""What an adapter is, as frozen dataclasses that go into the adapter file as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .errors import FeedFaceError, problems

#: Host families with a name of their own. ``sd_unet`` is a Stable Diffusion U-Net of any other size.
HOSTS = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd_unet": "a U-Net with Stable Diffusion's layout",
    "unidiffuser": "UniDiffuser (U-ViT)",
}
#: What becomes of a face crop that reaches past the photo's border.
BORDERS = ("pad", "clamp")
COMBINATIONS = ("concat", "average", "weighted_average")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
#: Largest values of ``transformers.CLIPVisionConfig``, well above any published encoder.
VISION_LIMITS = {
    "hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 256, "num_attention_heads": 1024,
    "patch_size": 1024, "num_channels": 3,
}  # fmt: skip

_STRICT = ConfigDict(strict=True, extra="forbid")
_Size = Annotated[int, Field(ge=1, le=65536)]
_Channels = tuple[FiniteFloat, FiniteFloat, FiniteFloat]
_Positive = Annotated[FiniteFloat, Field(gt=0)]


@dataclass(frozen=True, config=_STRICT)
class SiteConfig:
    """One transformer block of the host that carries a control branch.

    Args:
        name: the canonical name of the block (its path in the original LDM or U-ViT layout).
        width: channels of the block's tokens.
        heads, head_dim: attention heads of the branch; ``heads * head_dim`` is usually the width.
    """

    name: str
    width: _Size
    heads: _Size
    head_dim: _Size

    def __post_init__(self):
        if self.heads * self.head_dim > 65536:
            raise ValueError(f"site {self.name}: {self.heads} heads of {self.head_dim} are more than 65536 channels")


@dataclass(frozen=True, config=_STRICT)
class EncoderConfig:
    """The frozen face encoder: a CLIP vision transformer and how its pixels are prepared.

    Args:
        config: the fields of ``transformers.CLIPVisionConfig``.
        image_size: side of the crop in pixels.
        image_mean, image_std: normalisation of each channel. The released adapter uses 0.5 / 0.5, not CLIP's own.
        layer: index into the hidden states; -2 is the penultimate layer, before the post layer norm.
        name: where the encoder comes from, shown to the user when it is not inside the adapter file.
        included: whether the adapter file carries the encoder's weights.
        fingerprint: short hash that says whether two adapters can share encoded faces.
        crop_scale: side of the square face crop over the longer side of the detected box.
        crop_border: a crop that reaches past the border is filled up there (``pad``), or moved and shrunk until it
            lies inside (``clamp``).
        crop_fill: grey value 0…1 past the border.
    """

    config: dict[str, Any] = field(default_factory=dict)
    image_size: Annotated[int, Field(ge=16, le=4096)] = 224
    image_mean: _Channels = CLIP_MEAN
    image_std: tuple[_Positive, _Positive, _Positive] = CLIP_STD
    layer: Annotated[int, Field(ge=-257, le=256)] = -2
    name: str = "openai/clip-vit-base-patch32"
    included: bool = True
    type: Literal["clip_vision"] = "clip_vision"
    fingerprint: str = ""
    crop_scale: Annotated[float, Field(gt=0, le=16)] = 1.1
    crop_border: Literal["pad", "clamp"] = "pad"
    crop_fill: Annotated[float, Field(ge=0, le=1)] = 0.5

    def __post_init__(self):
        for name, limit in VISION_LIMITS.items():
            value = self.config.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise ValueError(f"face encoder's {name} is {value!r}, expected a whole number of 1 to {limit}")
        if self.patch_size > self.image_size:
            raise ValueError(f"face encoder's patch_size {self.patch_size} is larger than image_size {self.image_size}")

    @property
    def patch_size(self) -> int:
        return self.config.get("patch_size", 32)

    @property
    def width(self) -> int:
        """Width E of the hidden states."""
        return self.config.get("hidden_size", 768)

    @property
    def tokens(self) -> int:
        """Tokens T of one reference: the class token and one for each patch (50 for ViT-B/32 at 224)."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, config=_STRICT)
class AdapterConfig:
    """Everything but the weights of an adapter.

    Args:
        host: a key of :data:`HOSTS`.
        sites: the blocks with a branch, in the order of the branches in the file.
        context_width: width C of the projected face tokens.
        tap: which tensor a branch reads, the frozen block's ``input`` (the paper) or ``output`` (the released code).
        self_attention: False for the cheaper branch that only attends to the face.
        depth: transformer blocks in one branch.
        null: what a prediction without a face means: ``off`` (the branch adds nothing), ``learned`` (trained null
            tokens) or ``zero_crop`` (the encoding of a crop of zeros).
        combination, max_references, strength: defaults that the nodes show.
        prediction: ``epsilon`` or ``v``, what the host was trained to predict.

    Raises:
        pydantic.ValidationError: a ``ValueError`` that names the fields.
    """

    host: Literal["sd1", "sd2", "sdxl", "sd_unet", "unidiffuser"]
    sites: Annotated[tuple[SiteConfig, ...], Field(min_length=1, max_length=4096)]
    context_width: _Size
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    tap: Literal["input", "output"] = "input"
    self_attention: bool = True
    depth: Annotated[int, Field(ge=1, le=64)] = 1
    null: Literal["off", "learned", "zero_crop"] = "off"
    combination: Literal["concat", "average", "weighted_average"] = "concat"
    max_references: Annotated[int, Field(ge=1, le=1024)] = 5
    strength: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    prediction: Literal["epsilon", "v"] = "epsilon"
    title: str = ""

    def __post_init__(self):
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError(f"a site is named twice among {', '.join(names[:8])}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AdapterConfig:
        """Raises :class:`FeedFaceError` for a text that is not an adapter config of this version."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise FeedFaceError(
                f"adapter config not understood ({problems(error)}); is the file from a newer version?"
            ) from None
