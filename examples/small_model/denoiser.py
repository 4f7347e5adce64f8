"""The small text-to-image U-Net: Stable Diffusion's layout on the 16 × 8 × 8 latent, trained on captions alone.

It predicts the velocity (Salimans & Ho 2022, appendix D), v = α_t·ε − σ_t·x, on Stable Diffusion's noise schedule,
together with the text encoder. Captions say nothing about who is shown, so neither does the model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from . import text
from .autoencoder import CHANNELS
from .drawing import People
from .loop import LoopConfig, train
from .people import SIZE

LOOP = LoopConfig(steps=4000, batch=32, rate=1.5e-3, warmup=100, weight_decay=0.02, average=0.995, seed=7)
EMPTY = 0.1  # share of empty captions, for guidance


def create() -> UNet2DConditionModel:
    """An untrained U-Net with transformers at 8 × 8, at 4 × 4 and in the middle."""
    torch.manual_seed(4)
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(128, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=text.WIDTH,
        attention_head_dim=4,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, for velocity; sampled from the last step on."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )


class TextToImage(nn.Module):
    """Text encoder and U-Net, trained together."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder: CLIPTextModel = text.create(tokenizer)
        self.unet = create()


def train_denoiser(
    people: People, latents: np.ndarray, tokenizer: CLIPTokenizer, folder: Path, loop: LoopConfig = LOOP, log=print
) -> TextToImage:
    """Trains on ``latents`` ``(N, 32, 8, 8)``, means then standard deviations, with captions drawn anew at each
    step."""
    model = TextToImage(tokenizer)
    alphas = scheduler().alphas_cumprod

    def loss_of(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = np.sort(rng.integers(len(latents), size=loop.batch))
        captions = [people.words(i, rng) if rng.random() >= EMPTY else "" for i in index]
        mean, std = torch.from_numpy(latents[index].astype(np.float32)).chunk(2, 1)
        x = mean + std * torch.randn_like(mean)
        noise = torch.randn_like(x)
        # stratified: each step of the optimiser sees all of the schedule
        t = torch.from_numpy((np.arange(loop.batch) + rng.random(loop.batch)) / loop.batch * 1000).long()
        t = t[torch.from_numpy(rng.permutation(loop.batch))]
        alpha, sigma = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        # plain matrix products: on a CPU the backward pass of the fused attention takes longer than all the rest
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            states = model.text_encoder(text.tokenize(tokenizer, captions)).last_hidden_state
            v = model.unet(alpha * x + sigma * noise, t, states).sample
        return {"loss": F.mse_loss(v.float(), alpha * noise - sigma * x)}

    return train("denoiser", folder, model, loop, loss_of, log)


@torch.no_grad()
def sample(
    model: TextToImage,
    tokenizer: CLIPTokenizer,
    captions: list[str],
    seed: int = 0,
    steps: int = 25,
    scale: float = 3.0,
) -> Tensor:
    """Latents ``(N, 16, 8, 8)`` of unit variance for captions, with classifier-free guidance: ε_∅ + scale·(ε_t −
    ε_∅)."""
    schedule = scheduler()
    schedule.set_timesteps(steps)
    states = model.text_encoder(text.tokenize(tokenizer, captions + [""] * len(captions))).last_hidden_state
    x = torch.randn(len(captions), CHANNELS, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))
    for t in schedule.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            told, untold = model.unet(torch.cat([x, x]), t, states).sample.float().chunk(2)
        x = schedule.step(untold + scale * (told - untold), t, x).prev_sample
    return x
