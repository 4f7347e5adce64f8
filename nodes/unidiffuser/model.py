"""UniDiffuser v1 as a model of ComfyUI: its ``BaseModel``, its config, and how it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...feedface_core.errors import FeedFaceError
from ...feedface_core.files import released
from ...feedface_core.modules.uvit import UViT
from ...feedface_core.modules.uvit_config import UViTConfig
from ..adapter import fast_attention
from .joint import TOKEN_KEY, JointSampling, pack, unpack

#: Extra key of a conditioning: the seed of a text of pure noise.
UNCONDITIONAL_KEY = "unidiffuser_unconditional"
#: Time of such a text; a given text has time 0.
_TEXT_IS_NOISE = 1000.0
_WRAPPER = "feedface_unidiffuser"


class JointUViT(UViT):
    """The U-ViT and the linear before its text, called the way ComfyUI calls a diffusion model.

    Args:
        uvit: sizes.
        state_width: of the CLIP text states that ``encode_prefix`` takes.
    """

    def __init__(
        self,
        uvit: UViTConfig,
        state_width: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations=None,
    ):
        factory = {"dtype": dtype, "device": device}
        super().__init__(uvit, operations=operations, attention=fast_attention(), **factory)
        self.encode_prefix = operations.Linear(state_width, uvit.text_width, **factory)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: dict | None = None,
        text_time: Tensor | None = None,
        **ignored,
    ) -> Tensor:
        """State ``(B, 4 + n, H, W)``, timesteps 1…1000, text ``(B, 77, 64)`` → noise of the state's shape."""
        options = transformer_options or {}
        executor = WrapperExecutor.new_class_executor(
            self._joint, self, get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        )
        return executor.execute(x, timesteps, context, control, options, text_time)

    def _joint(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        control: Any,
        transformer_options: dict,
        text_time: Tensor | None,
    ) -> Tensor:
        picture, token = unpack(x, self.config.latent_channels, self.config.clip_width)
        noise, token_noise = super().forward(
            picture, token, context, timesteps, text_time, transformer_options=transformer_options
        )
        return pack(noise, token_noise)


class UniDiffuserConfig(comfy.supported_models_base.BASE):
    """Stable Diffusion's latents and noise schedule, ε-prediction."""

    unet_extra_config: dict = {}
    sampling_settings = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}
    latent_format = comfy.latent_formats.SD15
    supported_inference_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    def __init__(self, uvit: UViTConfig, state_width: int):
        super().__init__({"uvit": uvit, "state_width": state_width})

    def inpaint_model(self) -> bool:
        return False

    def get_model(self, state_dict: dict, prefix: str = "", device: torch.device | None = None) -> UniDiffuser:
        return UniDiffuser(self, device=device)


class UniDiffuser(comfy.model_base.BaseModel):
    """Takes ordinary latents and CLIP text states; the CLIP image token comes from :class:`JointSampling`."""

    def __init__(self, model_config: UniDiffuserConfig, device: torch.device | None = None):
        super().__init__(model_config, comfy.model_base.ModelType.EPS, device=device, unet_model=JointUViT)

    @property
    def uvit(self) -> UViTConfig:
        return self.diffusion_model.config

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.manual_cast_dtype or self.get_dtype()

    def process_timestep(self, timestep: Tensor, **kwargs) -> Tensor:
        """UniDiffuser counts timesteps from 1 to 1000, Stable Diffusion from 0."""
        return timestep + 1

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options: dict | None = None,
        **kwargs,
    ) -> Tensor:
        if control is not None:
            raise FeedFaceError(
                "a ControlNet is connected to UniDiffuser, but ControlNets are made for the U-Net of "
                "Stable Diffusion. Take it out of the conditioning, or load a Stable Diffusion model."
            )
        options = transformer_options or {}
        channels, width = self.uvit.latent_channels, self.uvit.clip_width
        if x.shape[1] != channels:  # called with a whole state
            return super()._apply_model(x, t, None, c_crossattn, None, options, **kwargs)
        step = options.get(TOKEN_KEY)
        if step is None:
            raise FeedFaceError(
                "UniDiffuser was called outside of a sampling run, without its CLIP image token. A "
                "node that calls the model directly cannot be combined with it."
            )
        state = pack(x, step.rows(x.shape[0]))
        denoised = super()._apply_model(state, t, None, c_crossattn, None, options, **kwargs)
        picture, token = unpack(denoised, channels, width)
        step.record(token, options)
        return picture

    def extra_conds(self, **kwargs) -> dict[str, Any]:
        """The text after ``encode_prefix``, computed once for a run, and its time."""
        out = super().extra_conds(**kwargs)
        device = kwargs["device"]
        seed = kwargs.get(UNCONDITIONAL_KEY)
        if seed is None:
            text, time = self._encode_text(kwargs.get("cross_attn"), device), 0.0
        else:
            generator = torch.Generator().manual_seed(int(seed))
            text = torch.randn(1, self.uvit.text_tokens, self.uvit.text_width, generator=generator).to(device)
            time = _TEXT_IS_NOISE
        out["c_crossattn"] = comfy.conds.CONDRegular(text)
        out["text_time"] = comfy.conds.CONDRegular(torch.full((1,), time, device=device))
        return out

    @torch.no_grad()
    def _encode_text(self, states: Tensor | None, device: torch.device) -> Tensor:
        """CLIP text states ``(B, 77, 768)`` → ``(B, 77, 64)`` in float32."""
        width, tokens = self.diffusion_model.encode_prefix.in_features, self.uvit.text_tokens
        if states is None:
            raise FeedFaceError("UniDiffuser needs a text: connect CLIP Text Encode with a Stable Diffusion 1.x CLIP")
        if states.shape[-1] != width or states.shape[1] < tokens:
            raise FeedFaceError(
                f"UniDiffuser reads text states of {tokens} tokens, {width} wide: the CLIP-L of Stable "
                f"Diffusion 1.x. This conditioning has {states.shape[1]} tokens, {states.shape[-1]} "
                "wide, so it was made with the CLIP of another model."
            )
        if states.shape[1] > tokens:
            logging.warning(
                "[FeedFace] UniDiffuser reads the first %d tokens of a prompt; %d more are left out.",
                tokens,
                states.shape[1] - tokens,
            )
        states = states[:, :tokens].to(device, self.compute_dtype)
        return self.diffusion_model.encode_prefix(states).float()

    def memory_required(self, input_shape, cond_shapes: Mapping | None = None) -> float:
        """Bytes of activations: the long skips, one block at work, logits where the attention keeps them."""
        config, management = self.uvit, comfy.model_management
        height, width = (-(-side // config.patch) for side in input_shape[2:4])
        tokens = height * width + config.text_tokens + 4
        values = tokens * (config.width * (config.depth // 2 + 8) + 2 * config.hidden)
        if not (management.xformers_enabled() or management.pytorch_attention_flash_attention()):
            values += 2 * config.heads * tokens**2
        return 1.2 * input_shape[0] * values * management.dtype_size(self.compute_dtype)


def load_unidiffuser(path: Path, prefix_path: Path | None, dtype: torch.dtype | None = None):
    """The MODEL from the U-ViT's file and the ``encode_prefix`` of the caption decoder.

    Args:
        path: ``uvit_v1.pth`` or its conversion.
        prefix_path: ``caption_decoder.pth`` or its conversion; None when ``path`` carries the linear itself.
        dtype: of the weights; ComfyUI's choice when None.

    Raises:
        FeedFaceError: names the file and what it is instead.
    """
    tensors, prefix, config = released.read_uvit(path)
    if prefix_path is not None:
        prefix = released.read_prefix(prefix_path)
    if (made := prefix["encode_prefix.weight"].shape[0]) != config.text_width:
        raise FeedFaceError(
            f"{prefix_path or path}: encode_prefix makes text {made} wide, the U-ViT in {path} reads "
            f"{config.text_width}: the files do not belong together"
        )
    weights = {**tensors, **prefix}
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    model_config = UniDiffuserConfig(config, weights["encode_prefix.weight"].shape[1])
    supported = list(model_config.supported_inference_dtypes)
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(weights),
            supported_dtypes=supported,
            weight_dtype=comfy.utils.weight_dtype(weights),
        )
    model_config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    model = model_config.get_model(weights)
    # Newer versions can manage memory by page, and then take the weights as they lie in the file.
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = patcher_class(model, load_device=device, offload_device=offload)
    if not management.is_device_cpu(offload):
        model.to(offload)
    dynamic = hasattr(patcher, "is_dynamic") and patcher.is_dynamic()
    model.load_model_weights(weights, "", **({"assign": True} if dynamic else {}))
    return carry_token(patcher)


def carry_token(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """The patcher given, of a :class:`UniDiffuser`, with the wrappers that sample the CLIP image token along."""
    joint = JointSampling(patcher.model.uvit.latent_channels, patcher.model.uvit.clip_width)
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, _WRAPPER, joint.calc_cond_batch)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _WRAPPER, joint.outer_sample)
    return patcher
