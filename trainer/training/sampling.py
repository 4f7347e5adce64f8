"""Pictures from a frozen model and an adapter, with the guidance functions that the nodes use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from feedface_core.conditioning import FaceControl
from feedface_core.guidance import Guidance

from ..models.frozen_model import FrozenModel, Text


def predicted(model: FrozenModel, noisy: Tensor, clean: Tensor, timestep: int) -> Tensor:
    """The prediction that amounts to these clean latents; all of the latents' shape."""
    level = model.scheduler.alphas_cumprod[timestep].to(noisy.device)
    noise = (noisy - level.sqrt() * clean) / (1.0 - level).sqrt()
    return noise if model.prediction == "epsilon" else level.sqrt() * noise - (1.0 - level).sqrt() * clean


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
    change_clean: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Denoise with DDIM (Song et al. 2021), without randomness after the initial noise.

    Args:
        model: with the adapter attached.
        noise: ``(B, *latent_shape)`` standard normal.
        text: text states of the prompts, each ``(B, …)``.
        guidance: which predictions are combined and how.
        face: one face for all, or one for each, or None for the pictures without it: the same guidance with the face
            dropped everywhere.
        dropped: what a dropped face is to the adapter; None adds nothing.
        steps: denoising steps.
        before_step: called before each of them; an exception from it breaks the sampling off.
        change_clean: changes the predicted clean latents of a step; called with them and the number of the step.

    Returns:
        Latents of the noise's shape.
    """
    scheduler = DDIMScheduler.from_config(
        model.scheduler.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    names, count = guidance.needed, len(noise)
    null = {key: value.expand(count, *value.shape[1:]) for key, value in model.null_text().items()}
    states = {key: torch.cat([(text if name in ("text", "both") else null)[key] for name in names]) for key in text}
    rows = [(count, face if name in ("face", "both") and face is not None else dropped) for name in names]
    if all(face is None for _, face in rows):  # no adapter is needed
        rows = None
    latents = noise.to(model.device, torch.float32)
    for number, timestep in enumerate(scheduler.timesteps.tolist()):
        before_step()
        batch = torch.cat([latents] * len(names))  # (predictions · B, …)
        times = torch.full((len(batch),), timestep, device=model.device)
        with model.sampling():
            predictions = model.predict(batch, times, states, rows)
        guided = guidance.combine(dict(zip(names, predictions.chunk(len(names)), strict=True)))
        if change_clean is not None:
            clean = change_clean(model.clean(latents, guided, times[:count]), number)
            guided = predicted(model, latents, clean, timestep)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents
