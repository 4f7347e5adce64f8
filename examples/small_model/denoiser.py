"""The small text-to-image U-Net: Stable Diffusion's layout on the autoencoder's latent, trained on captions alone.

It predicts the velocity (Salimans & Ho 2022, appendix D) on Stable Diffusion's noise schedule, together with the text
encoder. Captions say nothing about who is shown, so neither does the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from . import text
from .autoencoder import CHANNELS
from .drawing import People
from .people import ATTRIBUTES, Scene, caption
from .settings import UNetStage
from .training import train

EMPTY = 0.1  # share of empty captions, for guidance


def create(size: int = 64, widths: Sequence[int] = (128, 128)) -> UNet2DConditionModel:
    """An untrained U-Net for pictures with ``size`` pixels a side, with a level for each of ``widths``.

    Transformers are on all levels and in the middle; with three levels or more not on the first, where most of the
    time would go into them.
    """
    torch.manual_seed(4)
    attends = [len(widths) < 3 or level > 0 for level in range(len(widths))]
    return UNet2DConditionModel(
        sample_size=size // 8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=tuple(widths),
        down_block_types=tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
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

    def __init__(self, tokenizer: CLIPTokenizer, size: int = 64, widths: Sequence[int] = (128, 128)):
        super().__init__()
        self.text_encoder: CLIPTextModel = text.create(tokenizer)
        self.unet = create(size, widths)
        self.tokenizer, self.schedule = tokenizer, scheduler()

    def velocities(self, x: Tensor, noise: Tensor, t: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Predicted and true velocities of latents ``(N, C, h, w)`` with their noise at timesteps ``(N,)``."""
        # plain matrix products: on a CPU the backward pass of the fused attention takes longer than all the rest
        with sdpa_kernel(SDPBackend.MATH):
            states = self.text_encoder(text.tokenize(self.tokenizer, captions)).last_hidden_state
            v = self.unet(self.schedule.add_noise(x, noise, t), t, states).sample
        return v.float(), self.schedule.get_velocity(x, noise, t)


class Pictures(NamedTuple):
    """What the U-Net is trained on: pictures with their records, and what :func:`~.autoencoder.encode_all` gave."""

    people: People
    encoded: Mapping[str, Tensor]


def train_denoiser(
    pictures: Pictures, pairs: Pictures | None, model: TextToImage, folder: Path, stage: UNetStage
) -> TextToImage:
    """Trains on latents with captions drawn anew each time, in a share of the steps on pictures of two people; these,
    of twice the size, come in half the number, so that every step costs the same."""

    def losses(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        if pairs is not None and rng.random() < stage.pair_share:
            return _losses(model, pairs, max(1, stage.batch_size // 2), stage.face_weight, rng)
        return _losses(model, pictures, stage.batch_size, stage.face_weight, rng)

    return train(folder, model, stage, losses)


def _losses(
    model: TextToImage, pictures: Pictures, batch: int, face_weight: float, rng: np.random.Generator
) -> dict[str, Tensor]:
    people, latents, faces = pictures.people, pictures.encoded["latents"], pictures.encoded["faces"]
    index = rng.integers(len(people), size=batch)
    captions = [people.words(i, rng) if rng.random() >= EMPTY else "" for i in index]
    mean, std = latents[index].float().chunk(2, 1)
    x = mean + std * torch.randn_like(mean)
    # stratified: each step of the optimiser sees all of the schedule
    t = torch.from_numpy(rng.permutation((np.arange(batch) + rng.random(batch)) / batch * 1000)).long()
    v, wanted = model.velocities(x, torch.randn_like(x), t, captions)
    wrong = ((v - wanted) ** 2).mean(1, keepdim=True)  # (N, 1, h, w)
    weight = 1 + (face_weight - 1) * faces[index].float()
    return {"loss": (wrong * weight).mean() / weight.mean(), "unweighted": wrong.mean()}


@torch.no_grad()
def cost_of_wrong_words(
    model: TextToImage, people: People, encoded: Mapping[str, Tensor], count: int = 512, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """How much a wrong word raises the loss on the face's cells: near 0 for an attribute that the model ignores.

    Args:
        people, encoded: pictures and what :func:`~.autoencoder.encode_all` made of them.
        count: the first pictures, each with one timestep and one noise for all captions.

    Returns:
        For each attribute the mean loss with the true captions, the mean rise with another value of that attribute
        named instead, and the standard error of the rise.
    """
    rng, count = np.random.default_rng(seed), min(count, len(people))
    generator = torch.Generator().manual_seed(seed)
    rises: dict[str, list[Tensor]] = {name: [] for name in ATTRIBUTES}
    true: list[Tensor] = []
    for index in torch.arange(count).split(64):
        mean = encoded["latents"][index].float().chunk(2, 1)[0]
        noise = torch.randn(mean.shape, generator=generator)
        t = torch.from_numpy((rng.permutation(len(index)) + 0.5) / len(index) * 1000).long()
        weight = encoded["faces"][index].float()

        def loss(scenes: Sequence[Scene]) -> Tensor:
            v, wanted = model.velocities(mean, noise, t, [caption(scene) for scene in scenes])  # noqa: B023
            wrong = ((v - wanted) ** 2).mean(1, keepdim=True) * weight  # noqa: B023
            return wrong.sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1e-6)  # noqa: B023

        scenes = [people.records[i] for i in index.tolist()]
        true.append(loss(scenes))
        for name, values in ATTRIBUTES.items():
            others = [[value for value in values if value != scene[name]] for scene in scenes]
            swapped = [{**scene, name: str(rng.choice(other))} for scene, other in zip(scenes, others, strict=True)]
            rises[name].append(loss(swapped) - true[-1])
    mean_loss, together = float(torch.cat(true).mean()), {name: torch.cat(rise) for name, rise in rises.items()}
    return {name: (mean_loss, float(r.mean()), float(r.std() / len(r) ** 0.5)) for name, r in together.items()}
