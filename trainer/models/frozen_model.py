"""The frozen base models that adapters are trained on, behind one interface.

A base wraps everything of a released text-to-image model that training does not change: the denoiser (the
*host* that control branches attach to), the autoencoder and the text encoders. All of it is frozen and in
evaluation mode; the host is in the number format of ``model.precision``, the encoders compute in float32, as
they do where the adapter is used. The training loop, the cache and the validation only know
:class:`Base`; nothing in it is particular to a U-Net. Latents are whatever :meth:`Base.sample_latents`
returns, of the shape that :meth:`Base.latent_shape` names: a base whose model denoises more than a picture
packs it into that tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from feedface_core.config import SiteConfig
    from feedface_core.modules.adapter import FaceAdapter
    from trainer.config import ModelSettings

Text = dict[str, Tensor]
Part = Literal["host", "autoencoder", "text"]
PARTS: tuple[Part, ...] = ("host", "autoencoder", "text")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class BaseError(ValueError):
    """A base model that is missing, incomplete, or not what the settings say."""


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving noise schedule and what the host predicts.

    ``x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε`` with ``t`` counted from 0; the target is ``ε``, or
    ``v = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0`` (Salimans and Ho 2022).

    Args:
        alphas_cumprod: ``(T,)`` the ᾱ of each timestep, float32.
        prediction: ``epsilon`` or ``v``.
    """

    alphas_cumprod: Tensor
    prediction: Literal["epsilon", "v"] = "epsilon"

    @property
    def steps(self) -> int:
        """Number of timesteps."""
        return len(self.alphas_cumprod)

    def _scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod.to(like.device)[timesteps].to(torch.float32)  # (B,)
        alpha = alpha.reshape(-1, *[1] * (like.dim() - 1))  # (B, 1, …)
        return alpha.sqrt(), (1.0 - alpha).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``(B, …)`` latents and noise, ``(B,)`` integer timesteps → noisy latents of the same shape."""
        signal, sigma = self._scales(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the host should predict, of the latents' shape."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._scales(timesteps, latents)
        return signal * noise - sigma * latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio ``ᾱ / (1 − ᾱ)`` of each timestep, ``(B,)``."""
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps].to(torch.float32)
        return alpha / (1.0 - alpha)

    def betas(self) -> Tensor:
        """``(T,)`` the β of each timestep, for samplers that want them."""
        alphas = self.alphas_cumprod.to(torch.float64)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
        return (1.0 - alphas / previous).to(torch.float32)


@runtime_checkable
class Base(Protocol):
    """A frozen text-to-image model.

    Attributes:
        family: host family, a key of ``feedface_core.config.HOSTS``.
        host: the frozen denoiser.
        schedule: its noise schedule.
        dtype: number format of the host.
        device: where the host is; encoders follow it when they are first used.
        cell: side of one latent cell in pixels.
        context_width: width of the text states the host attends to, the default width of the face tokens.
    """

    family: str
    host: nn.Module
    schedule: NoiseSchedule
    dtype: torch.dtype
    device: torch.device
    cell: int
    context_width: int

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents (and of the noise) of one picture of that size in pixels."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in −1…1 → moments ``(B, …)`` in float32: mean and log variance of the latents."""

    def sample_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Moments → scaled latents ``(B, *latent_shape)`` in float32; no noise gives the mean."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents → pixels ``(B, 3, H, W)`` in −1…1."""

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions → all that the text encoders read of them, ``(B, N)`` int64."""

    def encode_text(self, captions: Sequence[str]) -> Text:
        """Captions → named text states, each ``(B, …)`` in float32."""

    def null_text(self) -> Text:
        """The text states of the empty caption, each ``(1, …)``."""

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, rows: Any = None) -> Tensor:
        """The host's prediction in float32, of the noisy latents' shape.

        Args:
            noisy: ``(B, *latent_shape)``.
            timesteps: ``(B,)`` integers.
            text: as from :meth:`encode_text`, for B captions.
            rows: which rows carry which face, see ``feedface_core.conditioning.Rows``; None is no face.
        """

    def loss_weights(self, mask: Tensor, latents: Tensor) -> Tensor:
        """A mask ``(B, 1, h, w)`` over latent cells → weights that broadcast to the latents' shape."""

    def importance(self, latents: Tensor, image_token: float) -> Tensor | None:
        """How much each value counts in a loss, broadcasting to the latents; None where all count the same.

        Args:
            latents: of a batch.
            image_token: how much each value of a CLIP image token counts, if the host denoises one.
        """

    def sampling(self) -> AbstractContextManager[None]:
        """Within it, predictions are those of sampling, where the host is trained with other inputs."""

    def sites(self, which: Literal["default", "all"] | Sequence[str], heads: int | None = None) -> list[SiteConfig]:
        """The sites that a new adapter gets, in order.

        Raises:
            BaseError: for a name that is no site of this host.
        """

    def attach(self, adapter: FaceAdapter) -> None:
        """Put an adapter's branches beside the host's blocks; one adapter at a time."""

    def detach(self) -> None:
        """Take the branches away again."""

    def fingerprint(self, parts: Iterable[Part] = PARTS) -> str:
        """A short hash of the weights and number format of these parts, for caches and checkpoints."""

    def to(self, device: torch.device | str) -> Base:
        """Move the base; encoders that have been released are left out."""

    def release(self, *parts: Part) -> None:
        """Free the memory of parts that are no longer needed (encoders, once everything is cached)."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the host's activations in the backward pass, with the faces of the forward pass."""


def freeze(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Evaluation mode and no gradients, so that a frozen part takes no gradient memory for weights."""
    module.eval().requires_grad_(False)
    tensors = [*module.parameters(), *module.buffers()]
    same = dtype is None or all(tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point())
    return module if same else module.to(dtype)


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """For what a frozen encoder computes: no gradients, and float32 even where autocast is on."""
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        yield


def weights_fingerprint(modules: Mapping[str, nn.Module], values_each: int = 4096) -> str:
    """Sixteen hex digits over names, shapes, formats and up to ``values_each`` evenly spaced values of each
    tensor.

    Reading a sample keeps it under a second for a large model; any training or merge changes nearly every
    tensor.
    """
    digest = hashlib.sha256()
    for part, module in sorted(modules.items()):
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, -(-flat.numel() // values_each))].to("cpu", torch.float32)
            digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def load_base(settings: ModelSettings, device: torch.device | str = "cpu", parts: Iterable[Part] = PARTS) -> Base:
    """Load the frozen base that the settings name.

    Args:
        settings: the ``model`` section of the configuration.
        device: where the host goes.
        parts: what to load; the cache needs no host, training on a cache needs no encoders.

    Raises:
        BaseError: a path that is missing, a file that is no base, parts that are missing in it, or a base of
            another family or prediction than the settings say.
    """
    path = Path(settings.base).expanduser()
    if not path.exists() and not settings.allow_hub:
        raise BaseError(
            f"model.base: {settings.base} does not exist (looked in {path.absolute().parent}). Give the path of a "
            "checkpoint (.safetensors, .ckpt) or of a diffusers folder; names on the Hugging Face hub are only "
            "looked up with model.allow_hub=true"
        )
    from .unidiffuser import UniDiffuserBase
    from .unidiffuser_files import is_unidiffuser

    if settings.family == "unidiffuser" or (settings.family == "auto" and is_unidiffuser(path)):
        return UniDiffuserBase.load(settings, device, tuple(parts))
    from .stable_diffusion import StableDiffusionBase

    return StableDiffusionBase.load(settings, device, tuple(parts))
