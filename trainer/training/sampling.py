"""Pictures from a frozen model and an adapter, with the guidance functions that the nodes use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from feedface_core.conditioning import FaceControl
from feedface_core.guidance import Guidance

from ..models.frozen_model import FrozenModel, Text


@torch.no_grad()
def sample(
    model: FrozenModel,
    noise: Tensor,
    text: Text,
    guidance: Guidance,
    face: FaceControl | None,
    dropped: FaceControl | None = None,
    steps: int = 20,
    before_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Denoise with DDIM (Song et al. 2021), without randomness after the initial noise.

    Args:
        model: with the adapter attached.
        noise: ``(1, *latent_shape)`` standard normal.
        text: text states of the prompt, each ``(1, …)``.
        guidance: which predictions are combined and how.
        face: the face, or None for the picture without it: the same guidance with the face dropped everywhere.
        dropped: what a dropped face is to the adapter; None adds nothing.
        steps: denoising steps.
        before_step: called before each of them; an exception from it breaks the sampling off.

    Returns:
        Latents of the noise's shape.
    """
    scheduler = DDIMScheduler.from_config(
        model.scheduler.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    names, null = guidance.needed, model.null_text()
    states = {key: torch.cat([(text if name in ("text", "both") else null)[key] for name in names]) for key in text}
    rows = [(1, face if name in ("face", "both") and face is not None else dropped) for name in names]
    latents = noise.to(model.device, torch.float32)
    for timestep in scheduler.timesteps.tolist():
        before_step()
        batch = latents.expand(len(names), *latents.shape[1:])  # (predictions, …)
        times = torch.full((len(names),), timestep, device=model.device)
        with model.sampling():
            predictions = model.predict(batch, times, states, rows)
        guided = guidance.combine({name: predictions[i : i + 1] for i, name in enumerate(names)})
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents
