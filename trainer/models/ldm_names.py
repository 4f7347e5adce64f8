"""A U-Net's weights by the names of the original Stable Diffusion release, which ComfyUI's loaders read."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

#: Modules of a diffusers U-Net by their names in the original release.
LDM_MODULES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_to_ldm(unet: nn.Module) -> dict[str, Tensor]:
    """A diffusers U-Net's weights by their original names."""
    weights = unet.state_dict()
    names = ldm_names(weights)
    return {names[name]: value for name, value in weights.items()}


def ldm_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of all weights of a U-Net → the original ones."""
    names = list(names)
    layers = len({name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")})
    levels = {int(name.split(".")[1]) for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    return {name: _ldm_name(name, layers, levels) for name in names}


def _ldm_name(name: str, layers: int, attending: set[int]) -> str:
    """The original name of one weight.

    Args:
        layers: residual blocks of a level on the way down.
        attending: levels on the way up that have attention.
    """
    for module, ldm in LDM_MODULES.items():
        if name.startswith(module + "."):
            return ldm + name.removeprefix(module)
    side, level, kind, index, rest = re.match(r"(down|up|mid)_blocks?\.?(\d*)\.(\w+)\.(\d+)\.(.+)", name).groups()
    index = int(index)
    if kind == "resnets":
        layer, _, leaf = rest.rpartition(".")
        rest = f"{LDM_RESNET[layer]}.{leaf}"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    level = int(level)
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.{2 if level in attending else 1}.{rest}"
    number = int(kind == "attentions")
    if side == "down":
        return f"input_blocks.{1 + level * (layers + 1) + index}.{number}.{rest}"
    return f"output_blocks.{level * (layers + 1) + index}.{number}.{rest}"
