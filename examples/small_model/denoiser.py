"""The small text-to-image U-Net: Stable Diffusion's layout on the autoencoder's latent, trained on captions alone.

It predicts the velocity (Salimans & Ho 2022, appendix D) on Stable Diffusion's noise schedule, together with the text
encoder. Captions say nothing about who is shown, so neither does the model.
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
from .settings import Stage
from .training import train

EMPTY = 0.1  # share of empty captions, for guidance


def create(size: int = 64) -> UNet2DConditionModel:
    """An untrained U-Net for pictures with ``size`` pixels a side; transformers on both levels and in the middle."""
    torch.manual_seed(4)
    return UNet2DConditionModel(
        sample_size=size // 8,
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

    def __init__(self, tokenizer: CLIPTokenizer, size: int = 64):
        super().__init__()
        self.text_encoder: CLIPTextModel = text.create(tokenizer)
        self.unet = create(size)


def train_denoiser(
    people: People, latents: Tensor, tokenizer: CLIPTokenizer, folder: Path, stage: Stage
) -> TextToImage:
    """Trains on ``latents`` ``(N, 32, h, w)``, means then standard deviations, with captions drawn anew each time."""
    model, schedule, batch = TextToImage(tokenizer, people.size), scheduler(), stage.batch_size

    def losses(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = rng.integers(len(people), size=batch)
        captions = [people.words(i, rng) if rng.random() >= EMPTY else "" for i in index]
        mean, std = latents[index].float().chunk(2, 1)
        x = mean + std * torch.randn_like(mean)
        noise = torch.randn_like(x)
        # stratified: each step of the optimiser sees all of the schedule
        t = torch.from_numpy(rng.permutation((np.arange(batch) + rng.random(batch)) / batch * 1000)).long()
        # plain matrix products: on a CPU the backward pass of the fused attention takes longer than all the rest
        with sdpa_kernel(SDPBackend.MATH):
            states = model.text_encoder(text.tokenize(tokenizer, captions)).last_hidden_state
            v = model.unet(schedule.add_noise(x, noise, t), t, states).sample
        return {"loss": F.mse_loss(v.float(), schedule.get_velocity(x, noise, t))}

    return train(folder, model, stage, losses)
