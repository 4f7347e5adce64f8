"""A small real ComfyUI model and its sampling: the ordinary classes, at a size that runs in milliseconds.

Import ComfyUI only after the fixture ``comfy`` has put it on the path, hence inside the functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONTEXT = 64


def build_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A ModelPatcher around ComfyUI's own SD 1.x model class with a U-Net of width 32 and 64."""
    import comfy.model_management
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    unet = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1],
        "context_dim": CONTEXT,
        "num_heads": 4,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "legacy": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        **changes,
    }
    config = comfy.supported_models.SD15(unet)
    config.set_inference_dtype(dtype, None)
    torch.manual_seed(seed)
    model = config.get_model({}, "", device=torch.device("cpu"))
    for parameter in model.diffusion_model.parameters():  # ComfyUI leaves new weights uninitialised
        with torch.no_grad():
            spread = max(parameter[0].numel(), 1) ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape) * spread + (parameter.ndim == 1))
    return ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def prompt(seed: int, **values):
    """A conditioning with random text states."""
    states = torch.randn(1, 77, CONTEXT, generator=torch.Generator().manual_seed(seed))
    return [[states, {"pooled_output": None, **values}]]


POSITIVE, NEGATIVE = 11, 12


def sample(
    model,
    positive=None,
    negative=None,
    cfg: float = 3.0,
    steps: int = 2,
    size=(16, 16),
    batch: int = 1,
    sampler: str = "euler",
    guider=None,
    **options,
) -> Tensor:
    """Latents from ComfyUI's own sampling, by KSampler's path or with a guider given."""
    import comfy.sample
    import comfy.samplers

    positive = prompt(POSITIVE) if positive is None else positive
    negative = prompt(NEGATIVE) if negative is None else negative
    noise = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(5))
    latent = torch.zeros_like(noise)
    if guider is not None:
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
        return guider.sample(noise, latent, comfy.samplers.sampler_object(sampler), sigmas, seed=5, disable_pbar=True)
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "normal", positive, negative, latent, seed=5, disable_pbar=True, **options
    )


def apply(pack, model, adapter, face=None, strength=1.0, start=0.0, end=1.0, mask=None):
    """What the node FeedFace Apply Adapter makes of a model."""
    return pack.apply.ApplyFeedFace.execute(model, adapter, strength, start, end, face, mask).args[0]
