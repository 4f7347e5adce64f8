"""Stable Diffusion's U-Net as a host, in ComfyUI's (LDM) layout and in that of diffusers.

The sites are read off the model itself: every transformer block inside a spatial transformer. Canonical names are the
LDM paths, e.g. ``input_blocks.1.1.transformer_blocks.0``; the blocks of a diffusers U-Net are mapped onto them, so one
adapter gives the same prediction through both.
"""

from __future__ import annotations

import re

from torch import nn

from ..config import SiteConfig
from .site import Site

#: Width of the text states by family.
_FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)$")
_LDM = re.compile(r"^(input_blocks|middle_block|output_blocks)\.")
_DIFFUSERS = re.compile(r"^(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.transformer_blocks\.(\d+)$")


def list_sites(unet: nn.Module) -> list[Site]:
    """Sites of a Stable Diffusion U-Net from input to output; an empty list for any other module."""
    blocks = [
        (path, module)
        for path, module in unet.named_modules()
        if _BLOCK.search(path) and hasattr(module, "attn1") and hasattr(module, "attn2")
    ]
    if all(_LDM.match(path) for path, _ in blocks):
        return [_site(path, path, block) for path, block in blocks]
    if all(_DIFFUSERS.match(path) for path, _ in blocks):
        sites = [_site(_ldm_name(unet, path), path, block) for path, block in blocks]
        # diffusers registers the middle block last.
        return sorted(sites, key=lambda site: _order(site.name))
    return []


def _site(name: str, path: str, block: nn.Module) -> Site:
    width, heads = block.attn1.to_q.weight.shape[1], block.attn1.heads
    return Site(name, path, width, heads, block.attn1.to_q.weight.shape[0] // heads)


def _order(name: str) -> tuple[int, ...]:
    stage, *rest = name.split(".")
    return (
        ("input_blocks", "middle_block", "output_blocks").index(stage),
        *(int(part) for part in rest if part.isdigit()),
    )


def _ldm_name(unet: nn.Module, path: str) -> str:
    side, level, attention, block = _DIFFUSERS.match(path).groups()
    if side is None:
        return f"middle_block.1.transformer_blocks.{block}"
    level, attention = int(level), int(attention)
    if side == "down":  # before a level: the first convolution, and for each earlier level its resnets and downsampler
        before = 1 + sum(len(stage.resnets) + 1 for stage in unet.down_blocks[:level])
        return f"input_blocks.{before + attention}.1.transformer_blocks.{block}"
    before = sum(len(stage.resnets) for stage in unet.up_blocks[:level])
    return f"output_blocks.{before + attention}.1.transformer_blocks.{block}"


def family(unet: nn.Module) -> str:
    """``sd1``, ``sd2`` or ``sdxl`` for the published sizes, else ``sd_unet``.

    Told apart by the width of the text states and the width of the first site, which is all an adapter depends on.
    """
    sites = list_sites(unet)
    modules = dict(unet.named_modules())
    context = modules[sites[0].path].attn2.to_k.weight.shape[1]
    name = _FAMILIES.get(context, "sd_unet")
    widths = {site.width for site in sites}
    published = {640, 1280} if name == "sdxl" else {320, 640, 1280}
    return name if name == "sd_unet" or widths <= published else "sd_unet"


def default_sites(unet: nn.Module) -> tuple[SiteConfig, ...]:
    """Every block of SD 1.x and 2.x (one in each spatial transformer); the last block of each for SDXL.

    SDXL has 70 blocks in 11 spatial transformers: a branch at each would add 78 % to the operations of a step.
    """
    last: dict[str, Site] = {}
    for site in list_sites(unet):
        last[site.name.rsplit(".transformer_blocks.", 1)[0]] = site
    return tuple(site.config() for site in last.values())
