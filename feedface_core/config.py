"""What an adapter is, as frozen dataclasses that go into the adapter file as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class SiteConfig:
    """One transformer block of the host that carries a control branch.

    Args:
        name: the canonical name of the block (its path in the original LDM or U-ViT layout).
        width: channels of the block's tokens.
        heads, head_dim: attention heads of the branch; ``heads * head_dim`` is usually the width.
    """

    name: str
    width: int
    heads: int
    head_dim: int

    def __post_init__(self):
        if min(self.width, self.heads, self.head_dim) < 1:
            raise ValueError(
                f"site {self.name}: width {self.width}, heads {self.heads} and head_dim "
                f"{self.head_dim} must be at least 1"
            )


@dataclass(frozen=True)
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

    config: dict = field(default_factory=dict)
    image_size: int = 224
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    layer: int = -2
    name: str = "openai/clip-vit-base-patch32"
    included: bool = True
    type: str = "clip_vision"
    fingerprint: str = ""
    crop_scale: float = 1.1
    crop_border: str = "pad"
    crop_fill: float = 0.5

    def __post_init__(self):
        object.__setattr__(self, "image_mean", tuple(float(value) for value in self.image_mean))
        object.__setattr__(self, "image_std", tuple(float(value) for value in self.image_std))
        if self.type != "clip_vision":
            raise ValueError(f"face encoder of type {self.type!r}: this version knows 'clip_vision'")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean {self.image_mean} and image_std {self.image_std} need three values each, "
                "the latter positive"
            )
        if not self.crop_scale > 0 or not 0 <= self.crop_fill <= 1 or self.crop_border not in BORDERS:
            raise ValueError(
                f"face crop with crop_scale {self.crop_scale}, crop_fill {self.crop_fill} and crop_border "
                f"{self.crop_border!r}: expected a positive scale, a fill of 0 to 1 and one of {BORDERS}"
            )

    @property
    def width(self) -> int:
        """Width E of the hidden states."""
        return int(self.config.get("hidden_size", 768))

    @property
    def tokens(self) -> int:
        """Tokens T of one reference: the class token and one for each patch (50 for ViT-B/32 at 224)."""
        return 1 + (self.image_size // int(self.config.get("patch_size", 32))) ** 2


@dataclass(frozen=True)
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
    """

    host: str
    sites: tuple[SiteConfig, ...]
    context_width: int
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    tap: str = "input"
    self_attention: bool = True
    depth: int = 1
    null: str = "off"
    combination: str = "concat"
    max_references: int = 5
    strength: float = 1.0
    prediction: str = "epsilon"
    title: str = ""

    def __post_init__(self):
        object.__setattr__(self, "sites", tuple(self.sites))
        for name, value, known in (
            ("host", self.host, tuple(HOSTS)),
            ("tap", self.tap, ("input", "output")),
            ("null", self.null, ("off", "learned", "zero_crop")),
            ("combination", self.combination, COMBINATIONS),
            ("prediction", self.prediction, ("epsilon", "v")),
        ):
            if value not in known:
                raise ValueError(f"adapter config: {name} is {value!r}, expected one of {', '.join(known)}")
        if not self.sites:
            raise ValueError("adapter config: no sites, so there is nothing the adapter could change")
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError(f"adapter config: a site is named twice in {names}")
        if self.depth < 1 or self.context_width < 1:
            raise ValueError(
                f"adapter config: depth {self.depth} and context_width {self.context_width} must be at least 1"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AdapterConfig:
        """Raises ``ValueError`` for a text that is not an adapter config of this version."""
        try:
            fields = json.loads(text)
            fields["sites"] = tuple(SiteConfig(**site) for site in fields["sites"])
            fields["encoder"] = EncoderConfig(**fields["encoder"])
            return cls(**fields)
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"adapter config not understood ({error}); is the file from a newer version?") from error
