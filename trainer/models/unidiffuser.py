"""UniDiffuser v1 from its released files: the model of the published FeedFace adapter.

Its U-ViT denoises the picture latent and a CLIP image token together. Here the two are one tensor: the token fills
further rows below the picture, so that noise, losses and samplers treat them alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Self

from feedface_core.conditioning import Rows
from feedface_core.config import CLIP_MEAN, CLIP_STD, SiteConfig
from feedface_core.hosts import uvit
from feedface_core.modules.uvit import run_block
from feedface_core.modules.uvit_config import UViTConfig

from ..config import ModelSettings
from ..errors import TrainerError
from .frozen_model import COMPONENTS, Component, FrozenModel, Text
from .precision import DTYPES, full_precision
from .stable_diffusion import StableDiffusion, sample_posterior
from .unidiffuser_files import load_image_encoder, load_prefix, load_stable_diffusion, load_uvit

#: The data-type token that the released model samples with.
SAMPLED_DATA_TYPE = 1
#: Stands for a log variance of minus infinity: the token has none.
_NO_VARIANCE = -30.0


def rows_below(width: int, token_width: int, channels: int = 4) -> int:
    """Rows that a token takes below a picture latent ``width`` cells wide."""
    return -(-token_width // (channels * width))


def pack(picture: Tensor, token: Tensor) -> Tensor:
    """``(B, C, h, w)`` and ``(B, 1, D)`` → ``(B, C, h + rows, w)``; at 512 pixels nothing is left over."""
    channels, width = picture.shape[1], picture.shape[3]
    rows = rows_below(width, token.shape[-1], channels)
    flat = functional.pad(token.flatten(1), (0, channels * rows * width - token.shape[-1]))
    return torch.cat([picture, flat.view(-1, channels, rows, width).to(picture)], dim=2)


def unpack(state: Tensor, token_width: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack`."""
    rows = rows_below(state.shape[3], token_width, state.shape[1])
    return state[:, :, :-rows], state[:, :, -rows:].flatten(1)[:, None, :token_width]


class UniDiffuser(FrozenModel):
    """A frozen UniDiffuser.

    Args:
        modules: those that are loaded of ``host`` (the U-ViT), ``autoencoder`` (a ``CLIPVisionModelWithProjection``,
            which encodes pictures beside Stable Diffusion's) and ``text`` (the linear ``encode_prefix``).
        stable_diffusion: the 1.x whose autoencoder and text encoder it uses; None when neither is needed.
        config: sizes of the U-ViT.
        name, dtype: see :class:`FrozenModel`.
        data_type: the data-type token in training.
    """

    family = "unidiffuser"

    def __init__(
        self,
        modules: dict[str, nn.Module],
        stable_diffusion: StableDiffusion | None,
        config: UViTConfig,
        name: str = "UniDiffuser",
        dtype: torch.dtype = torch.float32,
        data_type: int = SAMPLED_DATA_TYPE,
    ) -> None:
        schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        super().__init__(name, modules, schedule, dtype)
        self.stable_diffusion, self._data_type = stable_diffusion, data_type
        self.cell = 8 if stable_diffusion is None else stable_diffusion.cell
        self.channels, self.token_width = config.latent_channels, config.clip_width
        self.context_width = config.width

    @classmethod
    def load(
        cls, settings: ModelSettings, device: torch.device | str = "cpu", components: Sequence[Component] = COMPONENTS
    ) -> UniDiffuser:
        """Load the released files or their conversions; see :func:`trainer.models.frozen_model.load_frozen_model`."""
        path = Path(settings.base).expanduser()
        if not path.is_file():
            raise TrainerError(f"model.base: {path} is not a file; for UniDiffuser give uvit_v1.pth or its conversion")
        if settings.unet is not None:
            raise TrainerError("model.unet: UniDiffuser has no U-Net that a file could change; leave it out")
        host, prefix = load_uvit(path)
        loaders = {
            "host": lambda: host,
            "autoencoder": lambda: load_image_encoder(settings, host.config.clip_width),
            "text": lambda: load_prefix(settings, path, prefix),
        }
        modules = {name: load() for name, load in loaders.items() if name in components}
        shared = [name for name in components if name != "host"]
        stable_diffusion = load_stable_diffusion(settings, shared) if shared else None
        dtype = DTYPES[settings.precision]
        return cls(modules, stable_diffusion, host.config, settings.base, dtype, settings.data_type).to(device)

    # --- components --------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Self:
        """Move the model; the encoders follow when they are used."""
        if self.stable_diffusion is not None:
            self.stable_diffusion.to(device)
        return super().to(device)

    def release(self, *components: Component) -> None:
        """Free components that are no longer needed; the text states of the empty caption are kept."""
        super().release(*components)
        if self.stable_diffusion is not None:
            self.stable_diffusion.release(*components)

    def fingerprint(self, components: Iterable[Component] = COMPONENTS) -> str:
        """A short hash of the weights and number format of these components."""
        digest = hashlib.sha256()
        for name in components:
            digest.update(super().fingerprint([name]).encode())
            if name != "host":
                digest.update(self.stable_diffusion.fingerprint([name]).encode())
        return digest.hexdigest()[:16]

    # --- pictures ----------------------------------------------------------------------------------------

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """``(4, height / 8 + rows, width / 8)``: the picture, and the CLIP image token in the rows below it."""
        height, width = height // self.cell, width // self.cell
        return self.channels, height + rows_below(width, self.token_width, self.channels), width

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in −1…1 → ``(B, 8, h + rows, w)``: mean and log variance, unscaled, the token's zero."""
        token = self.image_token(pixels)  # (B, 1, D)
        mean, log_variance = self.stable_diffusion.encode_pixels(pixels).chunk(2, dim=1)
        return torch.cat([pack(mean, token), pack(log_variance, torch.full_like(token, _NO_VARIANCE))], dim=1)

    def image_token(self, pixels: Tensor) -> Tensor:
        """CLIP's projected image embedding ``(B, 1, 512)`` of pictures ``(B, 3, H, W)`` in −1…1, as UniDiffuser's."""
        [encoder] = self.component("autoencoder")
        side = encoder.config.image_size
        pixels = (pixels.to(self.device, torch.float32) + 1.0) / 2.0
        if pixels.shape[-2:] != (side, side):
            pixels = functional.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0.0, 1.0)
        mean, std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        with full_precision(self.device):
            return encoder.to(self.device)((pixels - mean) / std).image_embeds.unsqueeze(1)

    def sample_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents ``(B, 4, h + rows, w)``: the picture as Stable Diffusion's, scaled; the token as it is."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        picture, token = unpack(mean, self.token_width)
        if noise is not None:
            log_variance, noise = (unpack(tensor, self.token_width)[0] for tensor in (log_variance, noise))
        return pack(sample_posterior(picture, log_variance, noise) * 0.18215, token)

    def decode(self, latents: Tensor, gradient: bool = False) -> Tensor:
        """Latents → pixels ``(B, 3, H, W)``; the token has no part in it. See :meth:`FrozenModel.decode`."""
        self.component("autoencoder")
        return self.stable_diffusion.decode(unpack(latents, self.token_width)[0], gradient)

    def loss_weights(self, mask: Tensor, latents: Tensor) -> Tensor:
        """The mask, and for the token its mean: the token describes the face as far as the picture shows it."""
        mask = super().loss_weights(mask, latents)
        share = mask.mean(dim=(1, 2, 3)).view(-1, 1, 1).expand(-1, 1, self.token_width)
        return pack(mask.expand(-1, self.channels, -1, -1), share)

    def importance(self, latents: Tensor, image_token: float) -> Tensor | None:
        """1 for the picture, ``image_token`` for the token, 0 for cells that hold nothing; None if all are 1."""
        if image_token == 1.0:
            return None
        picture, token = unpack(latents[:1], self.token_width)
        return pack(torch.ones_like(picture), torch.full_like(token, image_token))

    # --- text --------------------------------------------------------------------------------------------

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions → token ids ``(B, 77)`` of CLIP-L."""
        self.component("text")
        return self.stable_diffusion.token_ids(captions)

    def encode_text(self, captions: Sequence[str]) -> Text:
        """Captions → ``states`` ``(B, 77, 64)``: CLIP-L's last hidden states through ``encode_prefix``."""
        [prefix] = self.component("text")
        states = self.stable_diffusion.encode_text(captions)["states"].to(self.device)
        with full_precision(self.device):
            return {"states": prefix.to(self.device)(states)}

    # --- prediction --------------------------------------------------------------------------------------

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, rows: Rows | None = None) -> Tensor:
        """The U-ViT's prediction in float32; see :meth:`FrozenModel.predict`."""
        picture, token = unpack(noisy, self.token_width)
        times = timesteps.to(self.device)
        inputs = (tensor.to(self.device, self.dtype) for tensor in (picture, token, text["states"]))
        with self.faces(rows):
            # UniDiffuser counts its timesteps from 1.
            data_type = torch.full_like(times, self._data_type)
            predicted = self.host(*inputs, times.float() + 1.0, data_type=data_type)
        out = pack(*(tensor.float() for tensor in predicted))
        if picture[0].numel() + self.token_width == noisy[0].numel():
            return out
        # Cells that hold nothing but noise predict it exactly, and so count for nothing in any loss.
        used = pack(torch.ones_like(picture), torch.ones_like(token)).bool()
        sigma = (1.0 - self.scheduler.alphas_cumprod.to(self.device)[times]).sqrt().view(-1, 1, 1, 1)
        return torch.where(used.to(self.device), out, noisy.to(self.device).float() / sigma)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it, the data-type token is that of sampling."""
        trained, self._data_type = self._data_type, SAMPLED_DATA_TYPE
        try:
            yield
        finally:
            self._data_type = trained

    # --- adapter -----------------------------------------------------------------------------------------

    def list_sites(self) -> tuple[list[SiteConfig], list[str]]:
        """Every block; branches have the published heads of width 24."""
        default = uvit.default_sites(self.host)
        heads = default[0].heads
        known = [SiteConfig(site.name, site.width, heads, site.width // heads) for site in uvit.list_sites(self.host)]
        return known, [site.name for site in default]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the blocks in the backward pass."""
        self.host.run_block = lambda *inputs: self.recompute(run_block, *inputs)
