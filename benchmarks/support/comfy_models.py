"""Models and adapters with random weights, on ComfyUI's own classes in this process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.find_comfyui import ROOT
from tools.tiny_checkpoint import SD15, random_weights, unet_weights
from trainer.models.precision import DTYPES, fastest_precision

PACK = "feedface_pack"
DTYPE = DTYPES[fastest_precision("cuda" if torch.cuda.is_available() else "cpu")]
ENCODER: dict[str, int] = {}  # of CLIPVisionConfig, whose defaults are ViT-B/32, the encoder of the published method


def pack(name: str) -> Any:
    """A module of the pack, such as ``nodes.apply``, loaded in this process as ComfyUI does."""
    load_comfyui()
    return importlib.import_module(f"{PACK}.{name}")


def load_comfyui() -> None:
    """Puts ComfyUI and the pack into this process, once; before that nothing of ``comfy`` can be imported.

    Raises:
        SystemExit: ``COMFYUI_PATH`` names no ComfyUI.
    """
    if PACK not in sys.modules:
        comfyui = os.environ.get("COMFYUI_PATH")
        if not comfyui or not (Path(comfyui) / "comfy").is_dir():
            raise SystemExit("COMFYUI_PATH must name ComfyUI's folder; `python run.py bench sampling` sets it")
        sys.path.insert(0, comfyui)
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACK])


def stable_diffusion(size: Any = SD15):
    """Stable Diffusion 1.5's U-Net as a ``ModelPatcher``, by ComfyUI's own detection."""
    load_comfyui()
    import comfy.model_detection

    weights = unet_weights(size, dtype=DTYPE)
    config = comfy.model_detection.model_config_from_unet(weights, "")
    config.set_inference_dtype(DTYPE, None)
    model = config.get_model(weights, "")
    model.load_model_weights(weights, "")
    return model_patcher(model)


def unidiffuser(size: Any = None):
    """UniDiffuser as a ``ModelPatcher``; ``size`` is a ``UViTConfig``, the published one when None."""
    module = pack("nodes.unidiffuser.model")
    config = module.UniDiffuserConfig(size or pack("feedface_core.modules.uvit_config").UViTConfig(), 768)
    config.set_inference_dtype(DTYPE, None)
    model = config.get_model({})
    fill(model.diffusion_model, seed=0)
    return module.carry_token(model_patcher(model))


def model_patcher(model: nn.Module):
    import comfy.model_management
    from comfy.model_patcher import ModelPatcher

    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return ModelPatcher(model, load_device=device, offload_device=offload)


def fill(module: nn.Module, seed: int) -> None:
    """Random weights that keep activations near one."""
    module.load_state_dict(random_weights(module.named_parameters(), seed, DTYPE), strict=False)


def random_adapter(folder: Path, host: str, sites, context_width: int, **fields):
    """A random adapter with CLIP ViT-B/32, through a file, as the node loads it."""
    config_module = pack("feedface_core.config")
    encoder = config_module.EncoderConfig(config=ENCODER, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    config = config_module.AdapterConfig(host=host, sites=sites, context_width=context_width, encoder=encoder, **fields)
    built = pack("feedface_core.modules.adapter").FaceAdapter(config, dtype=DTYPE)
    fill(built, seed=1)
    torch.manual_seed(2)
    weights = pack("feedface_core.modules.encoder").build_encoder(encoder, dtype=DTYPE).state_dict()
    save_adapter = pack("feedface_core.files.adapter_file").save_adapter
    path = save_adapter(folder / "random.safetensors", config, built.state_dict(), weights, dtype=DTYPE)
    return pack("nodes.adapter").LoadedAdapter(str(path))


def encode(adapter, crops: Tensor):
    """What FeedFace Encode Faces makes of crops ``(N, H, W, 3)``."""
    return pack("nodes.encode").EncodeFaces.execute(adapter, crops).args[0]


def people(face, count: int, side: int):
    """What FeedFace Regions makes of ``count`` faces in columns of a square picture."""
    conditioning, regions = pack("feedface_core.conditioning"), pack("feedface_core.faces.regions")
    return conditioning.People((face,) * count, regions.column_masks(count, side, side))


def apply(model, adapter, face, strength: float):
    """What FeedFace Apply Adapter makes of a model."""
    return pack("nodes.apply").ApplyFeedFace.execute(model, adapter, strength, 0.0, 1.0, face).args[0]


def branches_of(adapter) -> nn.Module:
    """The built ``FaceAdapter`` of a loaded one."""
    return adapter.patcher(DTYPE).model


def patch_plainly(model, built: nn.Module, hidden: Tensor, strength: float):
    """UniDiffuser with a face, its step written down straightforwardly.

    Every row goes through the branches, keys and values of the face are computed anew at each step, and the attention
    of the branches is in fp32.

    Args:
        built: the adapter, whose weights are shared.
        hidden: ``(N, T, E)`` hidden states of the face.
        strength: of the rows with the face; the others go through the branches with strength 0.
    """
    adapter = type(built)(built.config, device="meta", attention=fp32_attention)
    adapter.load_state_dict(built.state_dict(), assign=True)
    patched = model.clone()

    def with_branch(branch: nn.Module, block: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args, **kwargs) -> Tensor:
            out, options = block(x, *args, **kwargs), kwargs["transformer_options"]
            height, width = options["picture_grid"]
            first = out.shape[1] - height * width
            tokens = adapter.project(hidden.to(out)).flatten(0, 1).expand(out.shape[0], -1, -1)
            # Conditionings lie one after the other in the batch; number 0 is the positive one.
            strengths = [strength if number == 0 else 0.0 for number in options["cond_or_uncond"]]
            scale = out.new_tensor(strengths).repeat_interleave(out.shape[0] // len(strengths)).view(-1, 1, 1)
            added = branch(out[:, first:], branch.project_face(tokens)) * scale
            return torch.cat([out[:, :first], out[:, first:] + added], dim=1)

        return forward

    for site, branch in zip(adapter.config.sites, adapter.branches, strict=True):
        path = f"diffusion_model.{site.name}.forward"
        patched.add_object_patch(path, with_branch(branch, model.get_model_object(path)))
    return patched


def fp32_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in single precision, with all its logits in memory."""
    dtype = q.dtype
    q, k, v = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, N, L)
    weights = (logits if mask is None else logits + mask).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2).to(dtype)
