"""A U-Net as ComfyUI has it, and the prediction of an adapter there, against what the trainer predicts."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from trainer.models.ldm_names import unet_to_ldm


def comfy_model(unet=None, weights=None):
    """ComfyUI's own model around the same weights, found out from them as from a checkpoint.

    Args:
        unet: of diffusers.
        weights: in its place, by the names of a checkpoint.
    """
    import comfy.model_detection
    import comfy.model_management
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    if weights is None:
        weights = {f"model.diffusion_model.{name}": value for name, value in unet_to_ldm(unet).items()}
    described = comfy.model_detection.detect_unet_config(weights, "model.diffusion_model.")
    models = comfy.supported_models
    kind = models.SD20 if described["use_linear_in_transformer"] else models.SD15
    config = (models.SDXL if described["adm_in_channels"] else kind)(described)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(weights, "model.diffusion_model.", device=torch.device("cpu"))
    own = {name.removeprefix("model.diffusion_model."): value for name, value in weights.items()}
    model.diffusion_model.load_state_dict(own)
    return ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def run_in_comfyui(comfy, patcher, loaded, core, crops, noisy, timesteps, text):
    """The prediction of the model as the node FeedFace Apply Adapter leaves it, with the faces of its batch."""
    patches = comfy.module("nodes.model_patch")
    control = core.FaceControl(core.Face(loaded.encode(crops)), 0.7)
    model = patches.FacePatch.apply(loaded, control, patcher)
    patch = patches.FacePatch(loaded, loaded.patcher(torch.float32), control, "feedface_0")
    model.patch_model(torch.device("cpu"))
    try:
        conditions = {}
        if "pooled" in text:
            height, width = noisy.shape[2] * 8, noisy.shape[3] * 8
            conditions["y"] = torch.cat(
                [
                    model.model.encode_adm(pooled_output=pooled[None], width=width, height=height, device="cpu")
                    for pooled in text["pooled"]
                ]
            )
        positive = {"model_conds": {patch.key: control}}
        run = patch.start(SimpleNamespace(model_patcher=model, conds={"positive": [positive]}), noisy)
        step = patches.Evaluation(run, {(0, "b"): positive[patch.key]}, batch=1)
        options = {patch.key: step, "cond_or_uncond": [1, 0], "uuids": ["a", "b"]}
        with torch.no_grad():
            return model.model.diffusion_model(
                noisy, timesteps, text["states"], transformer_options=options, **conditions
            )
    finally:
        model.unpatch_model(torch.device("cpu"))
