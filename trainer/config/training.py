"""The settings of a training run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from feedface_core.errors import shorten

from .fields import Count, Name, PathText, Positive, PositiveFloat, Probability, Seed, Text, check_buckets
from .licences import LicenceSettings
from .loop import OptimiserSettings, TrainSettings
from .losses import LossSettings
from .sampling import SamplingSettings, Side
from .settings import Section, Settings


def _different(values: list[str]) -> list[str]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{shorten(value)} is there twice")
    return values


def _list_or_text(value: Any) -> str:
    return "list" if isinstance(value, (list, tuple)) else "text"


def _channels(low: float, high: float) -> Any:
    channel = Annotated[float, Field(ge=low, le=high)]
    return Annotated[tuple[channel, channel, channel], Field(strict=False)]  # YAML and JSON have lists


Manifests = Annotated[list[PathText], Field(min_length=1, max_length=1000), AfterValidator(_different)]
Sites = Annotated[list[Name], Field(min_length=1, max_length=1000), AfterValidator(_different)]
MAX_REFERENCES = 5


class ModelSettings(Section):
    """The frozen base model."""

    base: PathText
    """A single-file checkpoint (.safetensors, .ckpt) or diffusers folder; with allow_hub also a hub name."""
    config: PathText | None = None
    """A diffusers folder that describes a single-file checkpoint, for machines without network."""
    stable_diffusion: PathText | None = None
    """For UniDiffuser: the Stable Diffusion 1.x checkpoint or folder whose autoencoder and text encoder it uses."""
    caption_decoder: PathText | None = None
    """For UniDiffuser: caption_decoder.pth or its conversion; null looks beside the base."""
    image_encoder: PathText | None = None
    """For UniDiffuser: a folder with CLIP ViT-B/32 (CLIPModel) and its projection, which makes the image token."""
    data_type: Annotated[int, Field(ge=0, le=1)] = 1
    """For UniDiffuser: the data-type token in training. Sampling has 1; the published training has 0."""
    tokenizer: PathText | None = None
    """A folder with CLIP's vocab.json and merges.txt, for single-file checkpoints (ComfyUI's comfy/sd1_tokenizer)."""
    family: Literal["auto", "sd1", "sd2", "sdxl", "sd_unet", "unidiffuser"] = "auto"
    """The family of the base; anything but auto is checked against what the file holds."""
    unet: PathText | None = None
    """What trainer.export wrote beside an adapter whose training changed the U-Net: a LoRA to merge into the base's, or
    the U-Net in its place."""
    prediction: Literal["auto", "epsilon", "v"] = "auto"
    """What the base predicts; auto reads it from the scheduler's configuration."""
    precision: Literal["fp32", "fp16", "bf16"] = "bf16"
    """Number format of the frozen U-Net or U-ViT and of autocast. Encoders and trained weights are in fp32."""
    gradient_checkpointing: bool = False
    """Recompute the activations of the base in the backward pass: less memory, about a third slower."""
    attention: Literal["fused", "plain"] = "fused"
    """torch's fused kernels, or plain matrix products, which need memory for every logit but on a CPU, with sequences
    of a few hundred tokens, are faster in the backward pass."""
    allow_hub: bool = False
    """Allow model names that have to be downloaded from the Hugging Face hub."""


class EncoderSettings(Section):
    """The frozen image encoder of the face crops."""

    path: PathText | None = None
    """A folder with a transformers CLIPVisionModel (or CLIPModel)."""
    recogniser: Literal["insightface", "dlib"] | None = None
    """A face recogniser in the place of path: one vector for a face, for adapter.text_tokens (Face0)."""
    pooling: Literal["none", "class"] = "none"
    """All of CLIP's tokens for a reference, or its class token alone, which is what adapter.text_tokens needs."""
    layer: Annotated[int, Field(ge=-257, le=256)] = -2
    """Which hidden states are the face tokens; -2 is the penultimate, before the post layer norm."""
    image_size: Annotated[int, Field(ge=16, le=4096)] = 224
    """Side of the crop the encoder sees, in pixels."""
    image_mean: _channels(-10, 10) = (0.48145466, 0.4578275, 0.40821073)
    """Mean for each channel; the released adapter has 0.5."""
    image_std: _channels(1e-3, 10) = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation for each channel; the released adapter has 0.5."""
    included: bool = True
    """Put the encoder's weights into the adapter file, so that it needs nothing else."""
    name: Text = ""
    """Name of the encoder for an adapter file that does not include it."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.path is None) == (self.recogniser is None):
            raise ValueError("adapter.encoder has a path, or a recogniser: give one of them")
        return self


class TextTokensSettings(Section):
    """A face among the text's tokens in place of branches (Face0)."""

    count: Annotated[int, Field(gt=0, le=64)] = 3
    """Tokens of a face; they take the place of the text's last ones."""
    layers: Annotated[int, Field(gt=0, le=16)] = 4
    """Linear layers of the MLP that makes them."""
    width: Annotated[int, Field(gt=0, le=65536)] = 1024
    """Width of its hidden layers."""


class LoraSettings(Section):
    """A LoRA of the U-Net (Hu et al. 2021), trained along with the adapter."""

    rank: Annotated[int, Field(gt=0, le=1024)] = 16
    """Rank of the change of each matrix."""
    alpha: PositiveFloat | None = None
    """The change counts alpha / rank times; null takes the rank."""
    targets: Annotated[list[Name], Field(min_length=1, max_length=100), AfterValidator(_different)] = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    ]
    """Ends of the names of the linears and convolutions that it is on, in diffusers' U-Net."""


class AdapterSettings(Section):
    """The trained part: control branches and the projection of the face tokens."""

    encoder: EncoderSettings
    text_tokens: TextTokensSettings | None = None
    """Put the face among the text's tokens and train no branches; null trains branches."""
    background: bool = False
    """A second stream of the same kind for the photo without its face (Face Mixer)."""
    lora: LoraSettings | None = None
    """The LoRA of the U-Net with train.unet=lora; null takes the defaults."""
    sites: Annotated[
        Annotated[Literal["default", "all"], Tag("text")] | Annotated[Sites, Tag("list")], Discriminator(_list_or_text)
    ] = "default"
    """Where branches attach: one a spatial transformer, every transformer block, or a list of site names."""
    tap: Literal["input", "output"] = "input"
    """Which tensor of the frozen block the branch reads."""
    self_attention: bool = True
    """Whether a branch has self-attention; without it a branch costs about half."""
    mlp: bool = True
    """Whether a branch has an MLP; without both it is one attention to the face, at a seventh of the operations."""
    rank: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Rank of a branch's projections and last linear, for a smaller file; null leaves them full."""
    depth: Annotated[int, Field(gt=0, le=64)] = 1
    """Transformer blocks in a branch."""
    heads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """Attention heads of every branch; null takes those of the frozen block."""
    context_width: Annotated[int, Field(gt=0, le=65536)] | None = None
    """Width of the projected face tokens; null takes the base's cross-attention width."""
    dropped_face: Literal["none", "learned", "zero_crop"] = "none"
    """What a dropped face is: no branch, learned tokens, or the tokens of a crop of zeros."""
    combination: Literal["concat", "average"] = "concat"
    """How several references become one context."""
    init: PathText | None = None
    """An adapter file to start from."""
    title: Text = ""
    """Title in the adapter's metadata."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_name(cls, values: Any) -> Any:
        """``dropped_face: none`` was ``null: off`` before, which YAML reads as ``None: False``."""
        if isinstance(values, dict):
            values = {"dropped_face" if name in ("null", None) else name: value for name, value in values.items()}
            if values.get("dropped_face") is False or values.get("dropped_face") == "off":
                values["dropped_face"] = "none"
        return values

    @property
    def null(self) -> str:
        """``dropped_face`` as an adapter's own configuration says it."""
        return "off" if self.dropped_face == "none" else self.dropped_face


class DataSettings(Section):
    """Photos, references and how they are drawn."""

    manifest: Annotated[
        Annotated[PathText, Tag("text")] | Annotated[Manifests, Tag("list")], Discriminator(_list_or_text)
    ]
    """Manifests written by trainer.prepare (JSONL or Parquet), or of the released format."""
    weights: Annotated[list[PositiveFloat], Field(min_length=1, max_length=1000)] | None = None
    """Weight of each manifest: its share of the samples, whatever its size; null takes every photo equally often."""
    root: PathText | None = None
    """Folder that relative paths of the manifest start from; null takes the manifest's own folder."""
    drop_missing: bool = False
    """Leave out manifest rows whose files are missing, instead of stopping."""
    cache: PathText | None = None
    """Folder written by trainer.cache; null encodes everything at each step."""
    shards: PathText | None = None
    """Folder or address (https://…, s3://…) of shards written by trainer.cache --shards: neither the manifest nor its
    photos nor a cache are opened then."""
    cache_batch: Annotated[int, Field(gt=0, le=4096)] = 8
    """Photos, captions or crops that trainer.cache encodes at once."""
    resolution: Side = 512
    """Side of the training square, in pixels."""
    bucket_step: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Train photos of other shapes than a square, at sizes whose sides are multiples of this (64 suits Stable
    Diffusion) and whose area is at most resolution²; each batch is of one size. null crops squares."""
    bucket_ratio: Annotated[float, Field(ge=1, le=4)] = 2.0
    """With bucket_step, the longest size: its longer side over its shorter one."""
    crop: Literal["face", "centre"] = "face"
    """The training square: the middle of the photo, moved as little as it takes to hold the face, or not."""
    flip: bool = True
    """Mirror half of the samples, and half of the references."""
    flip_references: bool | None = None
    """Mirror half of the references; null does as data.flip says."""
    references: Annotated[int, Field(ge=1, le=MAX_REFERENCES)] = MAX_REFERENCES
    """Largest number of references of a sample; the number is drawn from 1 to it."""
    retrieval: bool = True
    """Take the references from other photos of the same identity where there are any."""
    duplicate_distance: Annotated[int, Field(ge=0, le=64)] = 4
    """Photos or face crops whose hashes differ in at most this many of 64 bits are the same picture."""
    augment_variants: Annotated[int, Field(ge=0, le=1000)] = 8
    """Where the own photo is the reference, because there is no other one of the person: in how many ways its crop is
    changed (place, size, tilt, colours, blur, background). The cache holds all of them; 0 takes the crop as it is."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the people who are not trained on, for a loss on faces that the adapter has not seen."""
    unreadable_photos: Count = 10
    """Photos that may turn out to be unreadable in one start of a run: their samples are replaced by others, and they
    are named; one more saves and stops."""
    unreadable_share: Probability = 0.0
    """The same as a share of all photos; the larger of the two counts."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 4
    """Loader processes for each training process; the samples do not depend on it."""
    repeat: Annotated[int, Field(gt=0, le=1000)] = 1
    """How often a photo comes in one epoch."""

    @property
    def holds_features(self) -> bool:
        """Whether features are read instead of photos."""
        return self.cache is not None or self.shards is not None

    @property
    def mirrors_references(self) -> bool:
        """Whether references are mirrored at all."""
        return self.flip if self.flip_references is None else self.flip_references


class ValidationSettings(SamplingSettings):
    """Pictures made during training, on fixed seeds and references."""

    prompts: Annotated[list[Text], Field(min_length=1, max_length=100)] = [
        "a photo of a person smiling in a garden",
        "an oil painting of a person",
    ]
    references: Annotated[list[PathText], Field(max_length=100)] = []
    """Photos of the person; empty takes the crops of the first samples of the manifest."""
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=100)] = [0]
    loss_every: Positive = 500
    """Steps between measurements of the loss on the people of data.held_out, where there are any."""
    loss_samples: Positive = 64
    """Photos of theirs that it is measured on."""


class Config(Settings):
    """Everything a training run depends on."""

    model: ModelSettings
    adapter: AdapterSettings
    data: DataSettings
    loss: LossSettings = LossSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    train: TrainSettings
    validation: ValidationSettings = ValidationSettings()
    licence: LicenceSettings = LicenceSettings()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.train.batch_size % self.optimiser.accumulation:
            raise ValueError(
                f"train.batch_size ({self.train.batch_size}) has to divide by "
                f"optimiser.accumulation ({self.optimiser.accumulation})"
            )
        if self.train.unet == "full" and self.loss.kind == "regularised":
            raise ValueError(
                "train.unet=full leaves no frozen model for loss.kind=regularised to hold the picture to; set "
                "loss.kind=mask or standard, or train.unet=lora"
            )
        if self.adapter.lora is not None and self.train.unet != "lora":
            raise ValueError(f"adapter.lora is given, but train.unet is {self.train.unet}; set train.unet=lora")
        if self.data.bucket_step is not None:
            check_buckets(self.data.bucket_step, self.data.resolution, self.data.weights, self.data.shards)
        if self.data.shards is not None and self.loss.identity.sees_crops:
            raise ValueError(
                "loss.identity.recogniser=facenet looks at the photos, and data.shards has none; with shards take the "
                "recogniser encoder"
            )
        return self
