"""Stable Diffusion 1.x, 2.x and XL through diffusers, from a folder or a single file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from feedface_core.config import HOSTS, SiteConfig
from feedface_core.hosts import sd_unet

from .attached import Attached
from .frozen_model import (
    DTYPES,
    PARTS,
    BaseError,
    NoiseSchedule,
    Part,
    Text,
    freeze,
    full_precision,
    weights_fingerprint,
)

if TYPE_CHECKING:
    from trainer.config import ModelSettings

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


class StableDiffusionBase(Attached):
    """A frozen Stable Diffusion: U-Net, autoencoder and one or two CLIP text encoders.

    Args:
        unet: a diffusers ``UNet2DConditionModel``.
        schedule: its noise schedule.
        autoencoder: a diffusers ``AutoencoderKL``, or None when everything is cached.
        text_encoders, tokenizers: one of each, two for Stable Diffusion XL; empty when everything is cached.
        name: shown in messages.
        dtype: number format of the U-Net; the encoders compute in float32.
        autoencoder_config: the autoencoder's configuration where it is not loaded itself.
    """

    def __init__(
        self,
        unet: nn.Module | None,
        schedule: NoiseSchedule,
        autoencoder: nn.Module | None = None,
        text_encoders: Sequence[nn.Module] = (),
        tokenizers: Sequence[Any] = (),
        name: str = "the base",
        dtype: torch.dtype = torch.float32,
        autoencoder_config: dict | None = None,
    ):
        self.name = name
        self.schedule = schedule
        self.dtype = dtype
        self.device = torch.device("cpu")
        self._unet = None if unet is None else freeze(unet, dtype)
        described = autoencoder_config if autoencoder is None else autoencoder.config
        described = {"block_out_channels": [0] * 4, "scaling_factor": 0.18215, **(described or {})}
        self._autoencoder = None if autoencoder is None else freeze(autoencoder, torch.float32)
        self._text_encoders = [freeze(encoder, torch.float32) for encoder in text_encoders]
        self._tokenizers = list(tokenizers)
        self._null_text: Text | None = None
        self.cell = 2 ** (len(described["block_out_channels"]) - 1)
        self.scaling = float(described["scaling_factor"])
        self.latent_channels = int(described.get("latent_channels", 4))
        self.family, self.context_width = "", 0
        if unet is not None:
            self.family = sd_unet.family(unet)
            self.context_width = int(unet.config.cross_attention_dim)
            self.latent_channels = int(unet.config.in_channels)
            if unet.config.in_channels != unet.config.out_channels:
                raise BaseError(
                    f"{name}: the U-Net takes {unet.config.in_channels} channels and predicts "
                    f"{unet.config.out_channels}; inpainting, depth and upscaling models are no bases for an adapter"
                )

    @classmethod
    def load(
        cls, settings: ModelSettings, device: torch.device | str = "cpu", parts: Sequence[Part] = PARTS
    ) -> StableDiffusionBase:
        """Load a diffusers folder or a single file; see :func:`trainer.models.frozen_model.load_base`."""
        from .diffusers_files import load_folder, load_single_file

        single = Path(settings.base).expanduser().is_file()
        components = (load_single_file if single else load_folder)(settings, parts)
        schedule = schedule_of(components.scheduler, settings)
        base = cls(
            components.unet,
            schedule,
            components.autoencoder,
            components.text_encoders,
            components.tokenizers,
            settings.base,
            DTYPES[settings.precision],
            components.autoencoder_config,
        )
        if base._unet is not None and settings.family not in ("auto", base.family):
            raise BaseError(
                f"model.base: {settings.base} is {HOSTS[base.family]}, but model.family says "
                f"{HOSTS[settings.family]}. Set model.family=auto or give another base"
            )
        return base.to(device)

    # --- parts -------------------------------------------------------------------------------------------

    @property
    def host(self) -> nn.Module:
        """The frozen U-Net."""
        return self._part(self._unet, "host")

    def _part(self, module: Any, part: Part) -> Any:
        if module is None or module == []:
            raise BaseError(f"{self.name}: the {part} part was not loaded, or has been released")
        return module

    def to(self, device: torch.device | str) -> StableDiffusionBase:
        """Move the base; the encoders follow when they are used."""
        self.device = torch.device(device)
        if self._unet is not None:
            self._unet.to(self.device)
        return self

    def release(self, *parts: Part) -> None:
        """Free parts that are no longer needed. The text states of the empty caption are kept."""
        if "text" in parts and self._text_encoders:
            self.null_text()
            self._text_encoders, self._tokenizers = [], []
        if "autoencoder" in parts:
            self._autoencoder = None
        if "host" in parts:
            self._unet = None

    def fingerprint(self, parts: Iterable[Part] = PARTS) -> str:
        """A short hash of the weights and number format of these parts."""
        modules: dict[str, nn.Module] = {}
        for part in parts:
            if part == "host":
                modules["host"] = self.host
            elif part == "autoencoder":
                modules["autoencoder"] = self._part(self._autoencoder, part)
            else:
                encoders = self._part(self._text_encoders, part)
                modules |= {f"text.{index}": encoder for index, encoder in enumerate(encoders)}
        return weights_fingerprint(modules)

    # --- pictures ----------------------------------------------------------------------------------------

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """``(channels, height / cell, width / cell)``."""
        return self.latent_channels, height // self.cell, width // self.cell

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in −1…1 → ``(B, 2 · channels, h, w)``: mean and log variance, unscaled."""
        autoencoder = self._part(self._autoencoder, "autoencoder").to(self.device)
        if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[-1] % self.cell or pixels.shape[-2] % self.cell:
            raise BaseError(
                f"pictures must be (B, 3, H, W) with sides a multiple of {self.cell}, got {tuple(pixels.shape)}"
            )
        with full_precision(self.device):
            return autoencoder.encode(pixels.to(self.device, torch.float32)).latent_dist.parameters

    def sample_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """``(μ + exp(½ log σ²) · noise) · scale``; the mean without noise."""
        mean, log_variance = moments.float().chunk(2, dim=1)  # (B, channels, h, w)
        if noise is not None:
            mean = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
        return mean * self.scaling

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents → pixels ``(B, 3, H, W)`` in −1…1, float32."""
        autoencoder = self._part(self._autoencoder, "autoencoder").to(self.device)
        latents = latents.to(self.device, torch.float32) / self.scaling
        with full_precision(self.device):
            return autoencoder.decode(latents).sample.clamp(-1.0, 1.0)

    def loss_weights(self, mask: Tensor, latents: Tensor) -> Tensor:
        """The mask itself: one weight for each latent cell, the same for all channels."""
        return mask.to(latents.device, torch.float32)

    def importance(self, latents: Tensor, image_token: float) -> None:
        """All values count the same."""
        return None

    # --- text --------------------------------------------------------------------------------------------

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions → token ids ``(B, 77)`` of one text encoder, ``(B, 154)`` of two."""
        return torch.cat(self._token_ids(captions), dim=1)

    def _token_ids(self, captions: Sequence[str]) -> list[Tensor]:
        encoders = self._part(self._text_encoders, "text")
        return [
            tokenizer(
                list(captions),
                padding="max_length",
                truncation=True,
                max_length=encoder.config.max_position_embeddings,
                return_tensors="pt",
            ).input_ids
            for tokenizer, encoder in zip(self._tokenizers, encoders, strict=True)
        ]

    def encode_text(self, captions: Sequence[str]) -> Text:
        """Captions → ``states`` ``(B, 77, context_width)``; with two encoders also ``pooled`` ``(B, P)``.

        One encoder gives its last hidden state after the final layer norm; two give their penultimate hidden
        states side by side (SDXL, Podell et al. 2023, section 2.1).
        """
        encoders = self._part(self._text_encoders, "text")
        states, pooled = [], None
        for ids, encoder in zip(self._token_ids(captions), encoders, strict=True):
            with full_precision(self.device):
                out = encoder.to(self.device)(ids.to(self.device), output_hidden_states=True)
            states.append(out.last_hidden_state if len(encoders) == 1 else out.hidden_states[-2])
            pooled = out[0]  # of the last encoder: the projected end-of-text token
        text = {"states": torch.cat(states, dim=-1)}  # (B, 77, context_width)
        if len(encoders) > 1:
            text["pooled"] = pooled
        return text

    def null_text(self) -> Text:
        """The text states of the empty caption, computed once."""
        if self._null_text is None:
            self._null_text = self.encode_text([""])
        return self._null_text

    # --- prediction --------------------------------------------------------------------------------------

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, rows: Any = None) -> Tensor:
        """The U-Net's prediction in float32; see :meth:`trainer.models.frozen_model.Base.predict`.

        SDXL's size conditioning is that of an uncut picture of this size, which is also what ComfyUI samples
        with unless told otherwise.
        """
        extra = {}
        if "pooled" in text:
            height, width = noisy.shape[-2] * self.cell, noisy.shape[-1] * self.cell
            sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device, dtype=self.dtype)
            extra["added_cond_kwargs"] = {
                "text_embeds": text["pooled"].to(self.device, self.dtype),
                "time_ids": sizes.expand(noisy.shape[0], -1),
            }
        states = text["states"].to(self.device, self.dtype)
        with self._faces(rows):
            out = self.host(
                noisy.to(self.device, self.dtype), timesteps.to(self.device), states, return_dict=False, **extra
            )
        return out[0].float()

    # --- adapter -----------------------------------------------------------------------------------------

    def sites(self, which: Literal["default", "all"] | Sequence[str], heads: int | None = None) -> list[SiteConfig]:
        """The sites that a new adapter gets, in order."""
        known = {site.name: site.config() for site in sd_unet.list_sites(self.host)}
        if which == "default":
            chosen = list(sd_unet.default_sites(self.host))
        elif which == "all":
            chosen = list(known.values())
        else:
            unknown = [name for name in which if name not in known]
            if unknown:
                raise BaseError(f"adapter.sites: {self.name} has no site {unknown[0]!r}; it has {', '.join(known)}")
            chosen = [known[name] for name in which]
        if heads is None:
            return chosen
        odd = [site for site in chosen if site.width % heads]
        if odd:
            raise BaseError(f"adapter.heads: {heads} does not divide the width {odd[0].width} of {odd[0].name}")
        return [SiteConfig(site.name, site.width, heads, site.width // heads) for site in chosen]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the U-Net's activations in the backward pass, with the faces of the forward pass.

        diffusers' own function would run the blocks again after the faces have been taken off.
        """

        def recompute(module: nn.Module, *inputs):
            rows = self._rows

            def run(*inputs):
                with self._faces(rows):
                    return module(*inputs)

            return checkpoint(run, *inputs, use_reentrant=False)

        self.host.enable_gradient_checkpointing(recompute)


def schedule_of(scheduler: dict, settings: ModelSettings) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler configuration.

    Raises:
        BaseError: for a schedule that is not of Stable Diffusion's kind.
    """
    from diffusers import DDPMScheduler

    kind, prediction = scheduler.get("_class_name", ""), scheduler.get("prediction_type", "epsilon")
    if "FlowMatch" in kind or "EDM" in kind or (prediction not in PREDICTIONS and settings.prediction == "auto"):
        raise BaseError(
            f"{settings.base}: scheduler {kind or 'unknown'} with prediction_type {prediction!r}; known are "
            "noise schedules of Stable Diffusion's kind that predict epsilon or v"
        )
    known = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    alphas = DDPMScheduler(**{key: scheduler[key] for key in known if scheduler.get(key) is not None}).alphas_cumprod
    chosen = PREDICTIONS[prediction] if settings.prediction == "auto" else settings.prediction
    return NoiseSchedule(alphas.float(), chosen)
