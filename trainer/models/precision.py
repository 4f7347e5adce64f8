"""The number formats of a base, which of them a processor computes in, and what stays in full precision."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
logger = logging.getLogger(__name__)


@contextmanager
def full_precision(device: torch.device | str, gradient: bool = False) -> Iterator[None]:
    """For what a frozen encoder computes: no gradients unless asked for, and float32 even where autocast is on."""
    on = gradient and torch.is_grad_enabled()
    with torch.set_grad_enabled(on), torch.autocast(torch.device(device).type, enabled=False):
        yield


def computes_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether the device has bfloat16 arithmetic.

    torch computes in it everywhere, but on a CPU that lacks it at 1/80 of the speed of float32 (a matrix product of
    1,024 × 1,024 on one core with AVX2: 0.6 against 50 GFLOP/s).
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return True
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(asked() for asked in known if asked is not None)


def fastest_precision(device: torch.device | str = "cpu") -> Literal["bf16", "fp32"]:
    """bf16 where the device computes in it, else fp32."""
    return "bf16" if computes_bf16(device) else "fp32"


def cpu_autocast() -> torch.autocast:
    """Autocast to bfloat16 on the CPU, where that is faster than none."""
    return torch.autocast("cpu", torch.bfloat16, enabled=computes_bf16("cpu"))


def warn_of_slow(precision: str, device: torch.device | str) -> None:
    """Logs a warning where a base in this format is far slower than it could be."""
    if precision == "bf16" and not computes_bf16(device):
        kind = torch.device(device).type
        logger.warning(
            "model.precision=bf16: this device (%s) has no bf16 arithmetic, so a step takes much longer than with "
            "model.precision=%s",
            kind,
            "fp32" if kind == "cpu" else "fp16",
        )
