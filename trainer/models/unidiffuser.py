"""UniDiffuser v1 from its released files: the base of the published FeedFace adapter.

Its U-ViT denoises the picture latent and a CLIP image token together. Here the two are one tensor: the token fills
further rows below the picture, so that noise, losses and samplers treat them alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from feedface_core.config import CLIP_MEAN, CLIP_STD, SiteConfig
from feedface_core.hosts import uvit

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
from .stable_diffusion import StableDiffusionBase
from .unidiffuser_files import load_image_encoder, load_prefix, load_stable_diffusion, read_uvit

if TYPE_CHECKING:
    from trainer.config import ModelSettings

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


class UniDiffuserBase(Attached):
    """A frozen UniDiffuser: U-ViT, and the CLIP image encoder, autoencoder and text encoder it was trained with.

    Args:
        host: the U-ViT, or None when only features are computed.
        prefix: the linear ``encode_prefix``, or None without text.
        image_encoder: a ``CLIPVisionModelWithProjection``, or None when everything is cached.
        parts: Stable Diffusion's autoencoder and text encoder, or None when everything is cached.
        name: shown in messages.
        dtype: number format of the U-ViT; the encoders compute in float32.
        data_type: the data-type token in training; sampling has 1.
    """

    family = "unidiffuser"

    def __init__(
        self,
        host: uvit.UViT | None,
        prefix: nn.Linear | None = None,
        image_encoder: nn.Module | None = None,
        parts: StableDiffusionBase | None = None,
        name: str = "UniDiffuser",
        dtype: torch.dtype = torch.float32,
        token_width: int = 512,
        data_type: int = SAMPLED_DATA_TYPE,
    ):
        self.name, self.dtype, self.device = name, dtype, torch.device("cpu")
        self._host = None if host is None else freeze(host, dtype)
        self._prefix = None if prefix is None else freeze(prefix, torch.float32)
        self._image_encoder = None if image_encoder is None else freeze(image_encoder, torch.float32)
        self._parts = parts
        self._null_text: Text | None = None
        self._data_type = data_type
        self.cell = 8 if parts is None else parts.cell
        self.channels = 4 if host is None else host.config.latent_channels
        self.token_width = token_width if host is None else host.config.clip_width
        self.context_width = 0 if host is None else host.config.width
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.schedule = NoiseSchedule(torch.cumprod(1.0 - betas, 0).float(), "epsilon")

    @classmethod
    def load(
        cls, settings: ModelSettings, device: torch.device | str = "cpu", parts: Sequence[Part] = PARTS
    ) -> UniDiffuserBase:
        """Load the released files or their conversions; see :func:`trainer.models.frozen_model.load_base`."""
        path = Path(settings.base).expanduser()
        if not path.is_file():
            raise BaseError(f"model.base: {path} is not a file; for UniDiffuser give uvit_v1.pth or its conversion")
        dtype = DTYPES[settings.precision]
        tensors, config = read_uvit(path)
        host = None
        if "host" in parts:
            host = uvit.UViT(config, device="meta")
            own = {key: tensor for key, tensor in tensors.items() if not key.startswith("encode_prefix.")}
            host.load_state_dict(own, assign=True)
        shared = [part for part in parts if part in ("autoencoder", "text")]
        return cls(
            host,
            load_prefix(settings, path, tensors) if "text" in parts else None,
            load_image_encoder(settings, config.clip_width) if "autoencoder" in parts else None,
            load_stable_diffusion(settings, shared) if shared else None,
            settings.base,
            dtype,
            config.clip_width,
            settings.data_type,
        ).to(device)

    # --- parts -------------------------------------------------------------------------------------------

    @property
    def host(self) -> nn.Module:
        """The frozen U-ViT."""
        return self._part(self._host, "host")

    def _part(self, module: Any, part: Part) -> Any:
        if module is None:
            raise BaseError(f"{self.name}: the {part} part was not loaded, or has been released")
        return module

    def to(self, device: torch.device | str) -> UniDiffuserBase:
        """Move the base; the encoders follow when they are used."""
        self.device = torch.device(device)
        if self._host is not None:
            self._host.to(self.device)
        if self._parts is not None:
            self._parts.to(self.device)
        return self

    def release(self, *parts: Part) -> None:
        """Free parts that are no longer needed. The text of the empty caption is kept."""
        if "text" in parts and self._prefix is not None:
            self.null_text()
            self._prefix = None
        if "autoencoder" in parts:
            self._image_encoder = None
        if "host" in parts:
            self._host = None
        if self._parts is not None:
            self._parts.release(*parts)

    def fingerprint(self, parts: Iterable[Part] = PARTS) -> str:
        """A short hash of the weights and number format of these parts."""
        digest = hashlib.sha256()
        for part in parts:
            own = {"host": self._host, "autoencoder": self._image_encoder, "text": self._prefix}[part]
            digest.update(weights_fingerprint({part: self._part(own, part)}).encode())
            if part != "host":
                digest.update(self._part(self._parts, part).fingerprint([part]).encode())
        return digest.hexdigest()[:16]

    # --- pictures ----------------------------------------------------------------------------------------

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """``(4, height / 8 + rows, width / 8)``: the picture, and the CLIP image token in the rows below it."""
        height, width = height // self.cell, width // self.cell
        return self.channels, height + rows_below(width, self.token_width, self.channels), width

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in −1…1 → ``(B, 8, h + rows, w)``: mean and log variance, unscaled, the token's zero."""
        mean, log_variance = self._part(self._parts, "autoencoder").encode_pixels(pixels).chunk(2, dim=1)
        token = self.image_token(pixels)  # (B, 1, D)
        return torch.cat([pack(mean, token), pack(log_variance, torch.full_like(token, _NO_VARIANCE))], dim=1)

    def image_token(self, pixels: Tensor) -> Tensor:
        """CLIP's projected image embedding ``(B, 1, 512)`` of pictures ``(B, 3, H, W)`` in −1…1, as UniDiffuser's."""
        encoder = self._part(self._image_encoder, "autoencoder").to(self.device)
        side = encoder.config.image_size
        pixels = (pixels.to(self.device, torch.float32) + 1.0) / 2.0
        if pixels.shape[-2:] != (side, side):
            pixels = functional.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0.0, 1.0)
        mean, std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        with full_precision(self.device):
            return encoder((pixels - mean) / std).image_embeds.unsqueeze(1)

    def sample_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents ``(B, 4, h + rows, w)``: the picture as Stable Diffusion's, scaled; the token as it is."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        picture, token = unpack(mean, self.token_width)
        if noise is not None:
            spread = torch.exp(0.5 * unpack(log_variance, self.token_width)[0].clamp(-30.0, 20.0))
            picture = picture + spread * unpack(noise, self.token_width)[0]
        return pack(picture * 0.18215, token)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents → pixels ``(B, 3, H, W)`` in −1…1, float32; the token has no part in it."""
        return self._part(self._parts, "autoencoder").decode(unpack(latents, self.token_width)[0])

    def loss_weights(self, mask: Tensor, latents: Tensor) -> Tensor:
        """The mask, and for the token its mean: the token describes the face as far as the picture shows it."""
        mask = mask.to(latents.device, torch.float32)
        share = mask.mean(dim=(1, 2, 3), keepdim=False).view(-1, 1, 1).expand(-1, 1, self.token_width)
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
        return self._part(self._parts, "text").token_ids(captions)

    def encode_text(self, captions: Sequence[str]) -> Text:
        """Captions → ``states`` ``(B, 77, 64)``: CLIP-L's last hidden states through ``encode_prefix``."""
        prefix = self._part(self._prefix, "text").to(self.device)
        states = self._part(self._parts, "text").encode_text(captions)["states"]
        with full_precision(self.device):
            return {"states": prefix(states.to(self.device))}

    def null_text(self) -> Text:
        """The text of the empty caption, computed once."""
        if self._null_text is None:
            self._null_text = self.encode_text([""])
        return self._null_text

    # --- prediction --------------------------------------------------------------------------------------

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, rows: Any = None) -> Tensor:
        """The U-ViT's prediction in float32; see :meth:`trainer.models.frozen_model.Base.predict`."""
        picture, token = unpack(noisy, self.token_width)
        times = timesteps.to(self.device)
        with self._faces(rows):
            predicted = self.host(
                picture.to(self.device, self.dtype),
                token.to(self.device, self.dtype),
                text["states"].to(self.device, self.dtype),
                times.float() + 1.0,  # UniDiffuser counts from 1
                data_type=torch.full_like(times, self._data_type),
            )
        out = pack(*(part.float() for part in predicted))
        left_over = self.channels * rows_below(noisy.shape[3], self.token_width, self.channels) * noisy.shape[3]
        if left_over == self.token_width:
            return out
        # Cells that hold nothing but noise predict it exactly, and so count for nothing in any loss.
        used = pack(torch.ones_like(picture), torch.ones_like(token)).bool()
        sigma = (1.0 - self.schedule.alphas_cumprod.to(self.device)[times]).sqrt().view(-1, 1, 1, 1)
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

    def sites(self, which: Literal["default", "all"] | Sequence[str], heads: int | None = None) -> list[SiteConfig]:
        """The sites that a new adapter gets, in order; branches have the published heads of width 24."""
        branch = uvit.default_sites(self.host)[0]
        heads = heads or branch.heads
        if branch.width % heads:
            raise BaseError(f"adapter.heads: {heads} does not divide the width {branch.width} of the U-ViT's blocks")
        known = [site.name for site in uvit.list_sites(self.host)]
        if which == "default":
            names = [site.name for site in uvit.default_sites(self.host)]
        else:
            names = known if which == "all" else list(which)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise BaseError(f"adapter.sites: {self.name} has no site {unknown[0]!r}; it has {', '.join(known)}")
        return [SiteConfig(name, branch.width, heads, branch.width // heads) for name in names]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the blocks in the backward pass, with the faces of the forward pass."""

        def recompute(block: nn.Module, x: Tensor, skip: Tensor | None, options: dict) -> Tensor:
            rows = self._rows
            if not torch.is_grad_enabled():
                return uvit.run_block(block, x, skip, options)

            def run(x: Tensor, skip: Tensor | None) -> Tensor:
                with self._faces(rows):
                    return uvit.run_block(block, x, skip, options)

            return checkpoint(run, x, skip, use_reentrant=False)

        self.host.run_block = recompute
