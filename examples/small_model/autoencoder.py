"""The small autoencoder: Stable Diffusion's layout, 64 × 64 pixels to 16 × 8 × 8, a few million parameters.

After training its latent is shifted and scaled so that
Stable Diffusion's factor 0.18215 gives unit variance.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from .drawing import People
from .loop import LoopConfig, pixels, train
from .people import SIZE

SCALE = 0.18215
GROUPS = 8
"""Groups of the normalisations. Stable Diffusion has 32, which with 32 channels would normalise each channel on its
own and so lose the colour of every flat picture."""
CHANNELS = 16  # of the latent; Stable Diffusion has four, which lose the eyes of a face that is 40 pixels wide
BOOTSTRAP = 300  # steps during which the latent is also drawn towards the colours of its place
LOOP = LoopConfig(steps=4000, batch=8, rate=2e-3, warmup=50, weight_decay=1e-4, average=0.995)


def create() -> AutoencoderKL:
    """An untrained autoencoder of 3.4 million parameters."""
    torch.manual_seed(1)
    channels = (32, 64, 96, 128)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        sample_size=SIZE,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        scaling_factor=SCALE,
    )


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def train_autoencoder(people: People, folder: Path, loop: LoopConfig = LOOP, log=print) -> AutoencoderKL:
    """Trains on the pictures of ``people`` with absolute errors of pixels, flat colours and edges, and a light KL
    term."""
    model = create().to(memory_format=torch.channels_last)

    def loss_of(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = np.sort(rng.integers(len(people.records), size=loop.batch))
        x = pixels(people.pictures[index]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float().clamp(-20, 10)
            y = model.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).sample.float()
        pixel = (y - x).abs().mean()
        # the layout normalises so often that flat colours are the last thing it learns: ask for them on their own
        color = F.avg_pool2d(x, 8)
        flat = (F.avg_pool2d(y, 8) - color).abs().mean()
        guide = ((mean[:, :3] - 2 * color) ** 2).mean() * max(0.0, 1 - step / BOOTSTRAP)
        edge = sum((a - b).abs().mean() for a, b in zip(_edges(y), _edges(x), strict=True))
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return {
            "loss": pixel + flat + 0.5 * edge + 0.2 * guide + 3e-4 * divergence,
            "pixel": pixel,
            "flat": flat,
            "edge": edge,
            "divergence": divergence,
        }

    model = train("autoencoder", folder, model, loop, loss_of, log)
    return standardise(model, people)


@torch.no_grad()
def standardise(model: AutoencoderKL, people: People, count: int = 512) -> AutoencoderKL:
    """Folds a shift and a factor into the two 1 × 1 convolutions at the latent: mean 0, standard deviation 1 /
    0.18215."""
    index = np.random.default_rng(0).choice(len(people.records), min(count, len(people.records)), replace=False)
    means = torch.cat(
        [model.encode(pixels(people.pictures[np.sort(part)])).latent_dist.mean for part in np.array_split(index, 16)]
    )
    shift = means.mean((0, 2, 3))  # (16,)
    factor = 1 / (SCALE * (means - shift[:, None, None]).std())
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:CHANNELS] *= factor
    quant.bias[:CHANNELS] = (quant.bias[:CHANNELS] - shift) * factor
    quant.bias[CHANNELS:] += 2 * torch.log(factor)
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight /= factor
    return model


@torch.no_grad()
def encode_all(model: AutoencoderKL, people: People, path: Path, batch: int = 32, log=print) -> np.ndarray:
    """Latents of every picture, scaled to unit variance: ``(N, 32, 8, 8)`` half floats, means then standard deviation.

    Written to ``path`` as it goes and resumed there.
    """
    count = len(people.records)
    progress = path.with_suffix(".txt")
    out = np.lib.format.open_memmap(
        path, "r+" if path.is_file() else "w+", np.float16, (count, 2 * CHANNELS, SIZE // 8, SIZE // 8)
    )
    start = int(progress.read_text()) if progress.is_file() else 0
    for at in range(start, count, batch):
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(pixels(people.pictures[at : at + batch])).latent_dist
        out[at : at + batch] = torch.cat([posterior.mean, posterior.std], 1).float().mul(SCALE).numpy()
        if (at // batch) % 50 == 49 or at + batch >= count:
            out.flush()
            progress.write_text(str(min(count, at + batch)))
            log(f"latents: {min(count, at + batch)} of {count}")
    return out
