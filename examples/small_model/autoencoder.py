"""The small autoencoder: Stable Diffusion's layout, an eighth of the side and 16 channels, 3.4 million parameters.

After training its latent is shifted and scaled so that Stable Diffusion's factor 0.18215 gives unit variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from feedface_core.files.atomic import write_safetensors
from trainer.models.precision import cpu_autocast

from .drawing import People
from .settings import AutoencoderStage
from .training import train

SCALE = 0.18215
GROUPS = 8
"""Groups of the normalisations. Stable Diffusion has 32, which with 32 channels would normalise each channel on its
own and so lose the colour of every flat picture."""
CHANNELS = 16  # of the latent; Stable Diffusion has four, which lose the eyes of a face that is 40 pixels wide
CHUNK = 1000  # pictures in a file of latents
BOOTSTRAP = 300  # steps during which the latent is also drawn towards the colours of its place


def create(size: int = 64) -> AutoencoderKL:
    """An untrained autoencoder for pictures with ``size`` pixels a side."""
    torch.manual_seed(1)
    return AutoencoderKL(
        latent_channels=CHANNELS,
        sample_size=size,
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        scaling_factor=SCALE,
    )


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def start_from(folder: Path, people: People) -> AutoencoderKL:
    """The autoencoder of a diffusers folder, standardised for the pictures of ``people``."""
    model = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    model.register_to_config(sample_size=people.size)
    return standardise(model.eval(), _some(people))


def train_autoencoder(
    people: People, folder: Path, stage: AutoencoderStage, start: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Trains on the pictures of ``people`` with absolute errors of pixels, flat colours and edges, and a light KL
    term. Of a model to ``start`` from only the decoder is trained: the latents stay those of its encoder."""
    model = (start or create(people.size)).to(memory_format=torch.channels_last)
    trained = nn.ModuleList([model.post_quant_conv, model.decoder]) if start else model

    def losses(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        x = people.pixels(rng.integers(len(people), size=stage.batch_size))
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(start is None):
            posterior = model.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float().clamp(-20, 10)
        y = model.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).sample.float()
        pixel = (y - x).abs().mean()
        # the layout normalises so often that flat colours are the last thing it learns: ask for them on their own
        color = F.avg_pool2d(x, 8)
        flat = (F.avg_pool2d(y, 8) - color).abs().mean()
        edge = sum((a - b).abs().mean() for a, b in zip(_edges(y), _edges(x), strict=True))
        loss = pixel + flat + 0.5 * edge
        if start:
            return {"loss": loss, "pixel": pixel, "flat": flat, "edge": edge}
        guide = ((mean[:, :3] - 2 * color) ** 2).mean() * max(0.0, 1 - step / BOOTSTRAP)
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = loss + 0.2 * guide + 3e-4 * divergence
        return {"loss": loss, "pixel": pixel, "flat": flat, "edge": edge, "divergence": divergence}

    train(folder, trained, stage, losses)
    return model.eval() if start else standardise(model, _some(people))


def _some(people: People) -> Iterator[Tensor]:
    """512 of the first 3,000 pictures, in batches."""
    known = min(3000, len(people))
    chosen = np.random.default_rng(0).choice(known, min(512, known), replace=False)
    return (people.pixels(index) for index in np.array_split(chosen, 16))


@torch.no_grad()
def standardise(model: AutoencoderKL, pictures: Iterable[Tensor]) -> AutoencoderKL:
    """Folds a shift and a factor into the two 1 × 1 convolutions at the latent, so that the means of these batches
    ``(N, 3, S, S)`` have mean 0 in each channel and standard deviation 1 / 0.18215."""
    means = torch.cat([model.encode(batch).latent_dist.mean for batch in pictures])
    shift = means.mean((0, 2, 3))  # (16,)
    factor = 1 / (SCALE * (means - shift[:, None, None]).std())
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:CHANNELS] *= factor
    quant.bias[:CHANNELS] = (quant.bias[:CHANNELS] - shift) * factor
    quant.bias[CHANNELS:] += 2 * torch.log(factor)
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight /= factor
    return model


def encode_all(load: Callable[[], AutoencoderKL], people: People, folder: Path) -> dict[str, Tensor]:
    """``latents`` of every picture, scaled to unit variance: ``(N, 32, h, w)`` half floats, means then standard
    deviation; and ``faces``, the share of head and hair in each cell, ``(N, 1, h, w)`` half floats.

    Kept in ``folder``, :data:`CHUNK` pictures a file, and read from there when they are there; ``load`` is called only
    when one is missing.
    """
    parts, model = [], None
    for first in range(0, len(people), CHUNK):
        index = range(first, min(first + CHUNK, len(people)))
        path = folder / f"{index.start:06d}-{index.stop:06d}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            model = model or load()
            write_safetensors(path, encode(model, people, index), {})
        parts.append(load_file(path))
    return {name: torch.cat([part[name] for part in parts]) for name in ("latents", "faces")}


@torch.no_grad()
def encode(model: AutoencoderKL, people: People, index: Sequence[int], batch: int = 20) -> dict[str, Tensor]:
    """What :func:`encode_all` gives, of some pictures."""
    model, latents = model.to(memory_format=torch.channels_last), []
    for first in range(0, len(index), batch):
        pixels = people.pixels(index[first : first + batch]).contiguous(memory_format=torch.channels_last)
        with cpu_autocast():
            posterior = model.encode(pixels).latent_dist
        latents.append(torch.cat([posterior.mean, posterior.std], 1).float().mul(SCALE).half().contiguous())
    return {"latents": torch.cat(latents), "faces": F.avg_pool2d(people.masks(index), 8).half()}
