"""What enters a node, checked: widgets can be wired to other nodes, and then nobody else looks at their values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..feedface_core.errors import FeedFaceError


def check_number(node: str, name: str, value: float, low: float, high: float) -> float:
    """A finite number in a range. Raises :class:`FeedFaceError` that names node and input."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FeedFaceError(f"{node}: {name} is {value!r}, expected a number from {low:g} to {high:g}")
    if not low <= value <= high:
        raise FeedFaceError(f"{node}: {name} is {value:g}, expected {low:g} to {high:g}")
    return value


def check_choice(node: str, name: str, value: str, options) -> str:
    """One of the options. Raises :class:`FeedFaceError` that names node and input."""
    if value not in options:
        raise FeedFaceError(f"{node}: {name} is {value!r}, expected one of {', '.join(options)}")
    return value


def check_mask(node: str, mask: Tensor | None) -> Tensor | None:
    """A mask as ``(M, H, W)`` within 0…1. Raises :class:`FeedFaceError` that names the node."""
    if mask is None:
        return None
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    if mask.ndim != 3 or 0 in mask.shape:
        raise FeedFaceError(f"{node}: mask must be (masks, height, width), got {tuple(mask.shape)}")
    if not torch.isfinite(mask).all():
        raise FeedFaceError(f"{node}: mask holds NaN or infinite values; check the node that made it")
    return mask.float().clamp(0.0, 1.0)


def check_crops(node: str, crops: Tensor) -> Tensor:
    """Crops as ``(N, H, W, 3)``: grey becomes RGB, alpha is dropped. Raises :class:`FeedFaceError` naming the node."""
    if not isinstance(crops, Tensor) or crops.ndim != 4 or crops.shape[0] == 0:
        found = f"shape {tuple(crops.shape)}" if isinstance(crops, Tensor) else "nothing"
        raise FeedFaceError(
            f"{node}: crops must be an image batch (N, H, W, 3), got {found}; connect FeedFace Detect Faces"
        )
    if crops.shape[-1] not in (1, 3, 4):
        raise FeedFaceError(f"{node}: crops have {crops.shape[-1]} channels, expected 3 (RGB), 1 (grey) or 4 (RGBA)")
    if not crops.is_floating_point() or not (crops.min() >= -0.5 and crops.max() <= 1.5):  # NaN fails both
        values = f"{crops.dtype} from {float(crops.min()):g} to {float(crops.max()):g}"
        raise FeedFaceError(f"{node}: crops hold {values}, expected floats in 0…1; check the node that made them")
    if min(crops.shape[1:3]) < 16:
        size = f"{crops.shape[2]} × {crops.shape[1]}"
        raise FeedFaceError(f"{node}: crops are {size} pixels, too small for a face; use a larger photo")
    return crops.expand(-1, -1, -1, 3) if crops.shape[-1] == 1 else crops[..., :3]
