"""Pictures from a base and an adapter, with the guidance functions that the nodes use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedface_core import guidance
from feedface_core.conditioning import FaceControl
from feedface_core.guidance import Guidance
from trainer.models.frozen_model import Base, Text

if TYPE_CHECKING:
    from ..config import ValidationSettings


def make_guidance(settings: ValidationSettings) -> Guidance:
    """The guidance that the settings name; the scales mean what they mean in the node FeedFace Guider."""
    return guidance.by_name(settings.guidance, settings.text_scale, settings.face_scale, settings.both_scale)


@torch.no_grad()
def sample(
    base: Base,
    noise: Tensor,
    text: Text,
    form: Guidance,
    face: FaceControl | None,
    dropped: FaceControl | None = None,
    steps: int = 20,
    before_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Denoise with DDIM (Song et al. 2021), without randomness after the initial noise.

    Args:
        base: with the adapter attached.
        noise: ``(1, *latent_shape)`` standard normal.
        text: text states of the prompt, each ``(1, …)``.
        form: which predictions are combined and how.
        face: the face, or None for the picture without it: the same guidance with the face dropped
            everywhere.
        dropped: what a dropped face is to the adapter; None adds nothing.
        steps: denoising steps.
        before_step: called before each of them; an exception from it breaks the sampling off.

    Returns:
        Latents of the noise's shape.
    """
    from diffusers import DDIMScheduler

    schedule = base.schedule
    scheduler = DDIMScheduler(
        trained_betas=schedule.betas().numpy(),
        prediction_type="v_prediction" if schedule.prediction == "v" else "epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    names = form.needed
    null = base.null_text()
    states = {key: torch.cat([(text if name in ("text", "both") else null)[key] for name in names]) for key in text}
    rows = [(1, face if name in ("face", "both") and face is not None else dropped) for name in names]
    latents = noise.to(base.device, torch.float32)
    for timestep in scheduler.timesteps.tolist():
        before_step()
        batch = latents.expand(len(names), *latents.shape[1:])  # (predictions, …)
        times = torch.full((len(names),), timestep, device=base.device)
        with base.sampling():
            predictions = base.predict(batch, times, states, rows)
        guided = form.combine({name: predictions[i : i + 1] for i, name in enumerate(names)})
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents
