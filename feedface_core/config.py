"""What an adapter is, as frozen dataclasses that go into the adapter file as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .errors import FeedFaceError, listing, problems, typed

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
#: What a stream's encoder looks at: the face, or the photo without it.
STREAMS = ("face", "background")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Size = Annotated[int, Field(ge=1, le=65536)]
_Mean = Annotated[float, Field(ge=-1000, le=1000)]
_Deviation = Annotated[float, Field(ge=1e-6, le=1000)]


@dataclass(frozen=True, config=_STRICT)
class SiteConfig:
    """One transformer block of the host that carries a control branch.

    Args:
        name: the canonical name of the block (its path in the original LDM or U-ViT layout).
        width: channels of the block's tokens.
        heads, head_dim: attention heads of the branch; ``heads * head_dim`` is usually the width.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    width: _Size
    heads: _Size
    head_dim: _Size

    def __post_init__(self):
        if self.heads * self.head_dim > 65536:
            raise ValueError(f"site {self.name}: {self.heads} heads of {self.head_dim} are more than 65536 channels")


class VisionFields(BaseModel):
    """The fields of ``transformers.CLIPVisionConfig`` that an encoder may set, with bounds well above any published."""

    model_config = _STRICT
    hidden_size: Annotated[int, Field(ge=1, le=16384)] = 768
    intermediate_size: _Size = 3072
    projection_dim: _Size = 512
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)] = 12
    num_attention_heads: Annotated[int, Field(ge=1, le=1024)] = 12
    num_channels: Literal[3] = 3
    image_size: _Size = 224
    patch_size: Annotated[int, Field(ge=1, le=1024)] = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(ge=0, le=1)] = 1e-5
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    initializer_range: _Deviation = 0.02
    initializer_factor: _Deviation = 1.0


@dataclass(frozen=True, config=_STRICT)
class EncoderConfig:
    """The frozen encoder: a CLIP vision transformer and how its pixels are prepared, or a face recogniser.

    Args:
        type: ``clip_vision``, or ``recogniser``: one vector for a face from the recogniser ``name``, of which only the
            width (``config``'s ``hidden_size``) is known here.
        config: some of :class:`VisionFields`; the others have its values.
        pooling: ``none`` keeps all tokens of CLIP's hidden states, ``class`` the class token alone, as one vector.
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
    image_mean: tuple[_Mean, _Mean, _Mean] = CLIP_MEAN
    image_std: tuple[_Deviation, _Deviation, _Deviation] = CLIP_STD
    layer: Annotated[int, Field(ge=-257, le=256)] = -2
    name: Annotated[str, Field(max_length=1000)] = "openai/clip-vit-base-patch32"
    included: bool = True
    type: Literal["clip_vision", "recogniser"] = "clip_vision"
    pooling: Literal["none", "class"] = "none"
    fingerprint: Annotated[str, Field(max_length=64)] = ""
    crop_scale: Annotated[float, Field(gt=0, le=16)] = 1.1
    crop_border: Literal["pad", "clamp"] = "pad"
    crop_fill: Annotated[float, Field(ge=0, le=1)] = 0.5

    def __post_init__(self):
        try:
            vision = VisionFields.model_validate(self.config)
        except ValidationError as error:
            raise ValueError(problems(error)) from None
        if vision.hidden_size % vision.num_attention_heads:
            raise ValueError(
                f"hidden_size {vision.hidden_size} does not divide into {vision.num_attention_heads} attention heads"
            )
        if vision.patch_size > self.image_size:
            raise ValueError(f"patch_size {vision.patch_size} is larger than image_size {self.image_size}")
        if self.type == "recogniser" and self.included:
            raise ValueError("a recogniser is not included in an adapter file: included must be false")

    @property
    def patch_size(self) -> int:
        return self.config.get("patch_size", 32)

    @property
    def width(self) -> int:
        """Width E of the hidden states."""
        return self.config.get("hidden_size", 768)

    @property
    def tokens(self) -> int:
        """Tokens T of one reference: the class token and one for each patch (50 for ViT-B/32 at 224); 1 of a vector."""
        if self.pooling == "class" or self.type == "recogniser":
            return 1
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, config=_STRICT)
class TextTokensConfig:
    """Tokens in the place of the last of the text's, instead of branches (Face0, SIGGRAPH Asia 2023, section 3).

    Args:
        count: tokens N of a face.
        layers: linear layers of the MLP that makes them of a vector.
        width: of its hidden layers.
        offset: tokens of the text that follow on them; so two streams stand beside each other.
    """

    count: Annotated[int, Field(ge=1, le=64)] = 3
    layers: Annotated[int, Field(ge=1, le=16)] = 4
    width: _Size = 1024
    offset: Annotated[int, Field(ge=0, le=64)] = 0


@dataclass(frozen=True, config=_STRICT)
class AdapterConfig:
    """Everything but the weights of an adapter, or of one of its streams.

    A stream is encoder → projection → injection, and the injection is control branches at sites (FeedFace) or tokens
    among the text's (Face0). An adapter has a stream of the face, and may have a second one of the photo without the
    face, its background (Face Mixer).

    Args:
        host: a key of :data:`HOSTS`.
        sites: the blocks with a branch, in the order of the branches in the file; none with ``text_tokens``.
        context_width: width C of the projected face tokens; that of the text with ``text_tokens``.
        tap: which tensor a branch reads, the frozen block's ``input`` (the paper) or ``output`` (the released code).
        self_attention: False for the cheaper branch that only attends to the face.
        mlp: False for the lightest branch, which together with no self-attention is one attention to the face.
        rank: of the projections of a branch's attention and of its last linear; None for full ones.
        depth: transformer blocks in one branch.
        null: what a prediction without a face means: ``off`` (the branch adds nothing), ``learned`` (trained null
            tokens) or ``zero_crop`` (the encoding of a crop of zeros).
        combination, max_references, strength: defaults that the nodes show.
        prediction: ``epsilon`` or ``v``, what the host was trained to predict.
        text_tokens: set for a stream that goes into text tokens.
        stream: which of :data:`STREAMS` this is.
        background: the second stream, with the same encoder and host.

    Raises:
        pydantic.ValidationError: a ``ValueError`` that names the fields.
    """

    host: Literal["sd1", "sd2", "sdxl", "sd_unet", "unidiffuser"]
    sites: Annotated[tuple[SiteConfig, ...], Field(max_length=4096)]
    context_width: _Size
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    tap: Literal["input", "output"] = "input"
    self_attention: bool = True
    mlp: bool = True
    rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    depth: Annotated[int, Field(ge=1, le=64)] = 1
    null: Literal["off", "learned", "zero_crop"] = "off"
    combination: Literal["concat", "average", "weighted_average"] = "concat"
    max_references: Annotated[int, Field(ge=1, le=1024)] = 5
    strength: Annotated[float, Field(ge=0, le=100)] = 1.0
    prediction: Literal["epsilon", "v"] = "epsilon"
    title: Annotated[str, Field(max_length=1000)] = ""
    text_tokens: TextTokensConfig | None = None
    stream: Literal["face", "background"] = "face"
    background: AdapterConfig | None = None

    def __post_init__(self):
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError(f"a site is named twice among {listing(names)}")
        if bool(self.sites) == bool(self.text_tokens):
            raise ValueError(f"an adapter has sites or text_tokens, this one has {'both' if self.sites else 'neither'}")
        if self.text_tokens and self.host == "unidiffuser":
            raise ValueError("text_tokens need a host with cross-attention to the text, which unidiffuser is not")
        if self.text_tokens and self.encoder.tokens != 1:
            raise ValueError(
                f"text_tokens are made of one vector for a face, but the encoder gives {self.encoder.tokens} tokens; "
                'its pooling must be "class"'
            )
        if self.background is None:
            return
        if self.background.stream != "background" or self.stream != "face" or self.background.background:
            raise ValueError("a second stream has stream=background and stands inside the stream of the face")
        if self.background.host != self.host or self.background.prediction != self.prediction:
            raise ValueError("the streams of an adapter have one host and one prediction")
        pooled = {"pooling": "none", "fingerprint": ""}
        own, other = (dataclasses.replace(one.encoder, **pooled) for one in (self, self.background))
        if own != other:
            raise ValueError("the streams of an adapter have one encoder; they may differ in its pooling alone")

    @property
    def streams(self) -> tuple[AdapterConfig, ...]:
        """This stream and the second one, if there is one."""
        return (self,) if self.background is None else (self, self.background)

    def to_json(self) -> str:
        """What older versions do not know is left out where it says nothing, so that they read the file."""
        values = dataclasses.asdict(self)
        for own in (values, values["background"] or {}):
            for name, default in (("text_tokens", None), ("background", None), ("stream", "face")):
                if own.get(name, default) == default:
                    own.pop(name, None)
            if own and own["encoder"]["pooling"] == "none":
                del own["encoder"]["pooling"]
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AdapterConfig:
        """Raises :class:`FeedFaceError` for a text that is not an adapter config of this version."""
        try:
            return typed(TypeAdapter(cls), text)
        except FeedFaceError as error:
            raise FeedFaceError(f"config not understood ({error}); is the file from a newer version?") from None
