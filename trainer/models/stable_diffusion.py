"""Stable Diffusion 1.x, 2.x and XL through diffusers, from a folder or a single file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from feedface_core.conditioning import Rows
from feedface_core.config import HOSTS, SiteConfig
from feedface_core.hosts import sd_unet
from feedface_core.text_tokens import replace_rows

from ..config import ModelSettings
from ..errors import TrainerError
from .diffusers_files import Components, load_folder, load_single_file
from .frozen_model import COMPONENTS, Component, FrozenModel, Text
from .precision import DTYPES, full_precision
from .unet import use_unet_file

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}
SCHEDULE_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


class StableDiffusion(FrozenModel):
    """A frozen Stable Diffusion: U-Net, autoencoder and one or two CLIP text encoders.

    Args:
        loaded: diffusers' modules, and what describes them.
        scheduler: noise schedule, and what the U-Net predicts.
        name, dtype: see :class:`FrozenModel`.

    Raises:
        TrainerError: for a U-Net that predicts something else than it takes.
    """

    def __init__(self, loaded: Components, scheduler: DDPMScheduler, name: str, dtype: torch.dtype) -> None:
        super().__init__(name, loaded.modules, scheduler, dtype)
        self._tokenizers = loaded.tokenizers
        autoencoder = {"block_out_channels": [0] * 4, "scaling_factor": 0.18215, **loaded.autoencoder}
        self.cell = 2 ** (len(autoencoder["block_out_channels"]) - 1)
        self.scaling = float(autoencoder["scaling_factor"])
        self.latent_channels = int(autoencoder.get("latent_channels", 4))
        self.family, self.context_width = "", 0
        if "host" in self.modules:
            config = self.host.config
            self.family, self.context_width = sd_unet.family(self.host), int(config.cross_attention_dim)
            self.latent_channels = int(config.in_channels)
            if config.in_channels != config.out_channels:
                raise TrainerError(
                    f"{name}: the U-Net takes {config.in_channels} channels and predicts {config.out_channels}; "
                    "inpainting, depth and upscaling models are no bases for an adapter"
                )

    @classmethod
    def load(
        cls, settings: ModelSettings, device: torch.device | str = "cpu", components: Sequence[Component] = COMPONENTS
    ) -> StableDiffusion:
        """Load a diffusers folder or a single file; see :func:`trainer.models.frozen_model.load_frozen_model`."""
        load = load_single_file if Path(settings.base).expanduser().is_file() else load_folder
        loaded = load(settings, components)
        model = cls(loaded, make_scheduler(loaded.scheduler, settings), settings.base, DTYPES[settings.precision])
        if model.family and settings.family not in ("auto", model.family):
            raise TrainerError(
                f"model.base: {settings.base} is {HOSTS[model.family]}, but model.family says "
                f"{HOSTS[settings.family]}. Set model.family=auto or give another base"
            )
        if settings.unet is not None and "host" in model.modules:
            use_unet_file(model.host, settings.unet)
        return model.to(device)

    # --- pictures ----------------------------------------------------------------------------------------

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """``(channels, height / cell, width / cell)``."""
        return self.latent_channels, height // self.cell, width // self.cell

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in −1…1 → ``(B, 2 · channels, h, w)``: mean and log variance, unscaled."""
        [autoencoder] = self.component("autoencoder")
        if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[-1] % self.cell or pixels.shape[-2] % self.cell:
            raise TrainerError(
                f"pictures must be (B, 3, H, W) with sides a multiple of {self.cell}, got {tuple(pixels.shape)}"
            )
        with full_precision(self.device):
            encoded = autoencoder.to(self.device).encode(pixels.to(self.device, torch.float32))
        return encoded.latent_dist.parameters

    def sample_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """``(μ + exp(½ log σ²) · noise) · scale``; the mean without noise."""
        return sample_posterior(*moments.float().chunk(2, dim=1), noise) * self.scaling

    def decode(self, latents: Tensor, gradient: bool = False) -> Tensor:
        """Scaled latents → pixels ``(B, 3, H, W)``; see :meth:`FrozenModel.decode`."""
        [autoencoder] = self.component("autoencoder")
        with full_precision(self.device, gradient):
            latents = latents.to(self.device, torch.float32) / self.scaling
            pixels = autoencoder.to(self.device).decode(latents).sample
            return pixels if gradient else pixels.clamp(-1.0, 1.0)

    # --- text --------------------------------------------------------------------------------------------

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions → token ids ``(B, 77)`` of one text encoder, ``(B, 154)`` of two."""
        return torch.cat(self._token_ids(captions), dim=1)

    def _token_ids(self, captions: Sequence[str]) -> list[Tensor]:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return [
            tokenizer(list(captions), max_length=encoder.config.max_position_embeddings, **options).input_ids
            for tokenizer, encoder in zip(self._tokenizers, self.component("text"), strict=True)
        ]

    def encode_text(self, captions: Sequence[str]) -> Text:
        """Captions → ``states`` ``(B, 77, context_width)``; with two encoders also ``pooled`` ``(B, P)``.

        One encoder gives its last hidden state after the final layer norm; two give their penultimate hidden states
        side by side (SDXL, Podell et al. 2023, section 2.1).
        """
        encoders = self.component("text")
        with full_precision(self.device):
            outputs = [
                encoder.to(self.device)(ids.to(self.device), output_hidden_states=True)
                for ids, encoder in zip(self._token_ids(captions), encoders, strict=True)
            ]
        if len(encoders) == 1:
            return {"states": outputs[0].last_hidden_state}
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # (B, 77, context_width)
        return {"states": states, "pooled": outputs[-1][0]}  # the last encoder's projected end-of-text token

    # --- prediction --------------------------------------------------------------------------------------

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        """The U-Net's prediction in float32; see :meth:`FrozenModel.predict`.

        SDXL's size conditioning is that of an uncut picture of this size, which is also ComfyUI's default.
        """
        conditions: dict[str, Any] = {}
        if "pooled" in text:
            height, width = noisy.shape[-2] * self.cell, noisy.shape[-1] * self.cell
            sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device, dtype=self.dtype)
            pooled = text["pooled"].to(self.device, self.dtype)
            conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.expand(noisy.shape[0], -1)}
        states = replace_rows(text["states"].to(self.device, self.dtype), rows)
        noisy, timesteps = noisy.to(self.device, self.dtype), timesteps.to(self.device)
        with self.faces(rows):
            return self.host(noisy, timesteps, states, return_dict=False, **conditions)[0].float()

    # --- adapter -----------------------------------------------------------------------------------------

    def list_sites(self) -> tuple[list[SiteConfig], list[str]]:
        """Every transformer block, with its own heads."""
        default = [site.name for site in sd_unet.default_sites(self.host)]
        return [site.config() for site in sd_unet.list_sites(self.host)], default

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the U-Net's blocks in the backward pass."""
        self.host.enable_gradient_checkpointing(self.recompute)


def sample_posterior(mean: Tensor, log_variance: Tensor, noise: Tensor | None) -> Tensor:
    """``μ + exp(½ log σ²) · noise``, all of one shape; the mean without noise."""
    return mean if noise is None else mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


def make_scheduler(config: dict[str, Any], settings: ModelSettings) -> DDPMScheduler:
    """The noise schedule of a diffusers scheduler configuration.

    Raises:
        TrainerError: for a schedule that is not of Stable Diffusion's kind.
    """
    name, prediction = config.get("_class_name", ""), config.get("prediction_type", "epsilon")
    known = prediction in PREDICTION_TYPES.values() or settings.prediction != "auto"
    if "FlowMatch" in name or "EDM" in name or not known:
        raise TrainerError(
            f"{settings.base}: scheduler {name or 'unknown'} with prediction_type {prediction!r}; known are noise "
            "schedules of Stable Diffusion's kind that predict epsilon or v"
        )
    fields = {key: config[key] for key in SCHEDULE_FIELDS if config.get(key) is not None}
    return DDPMScheduler(**fields, prediction_type=PREDICTION_TYPES.get(settings.prediction, prediction))
