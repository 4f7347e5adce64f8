"""GPUs that adapters are trained on, for estimates."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """Memory in GB, and dense peak in TFLOP/s in half precision with float32 sums and in float32, by its maker."""

    memory: int
    half: float
    single: float


GPUS = {
    "T4": Gpu(16, 65, 8.1),
    "RTX 3090": Gpu(24, 71, 35.6),
    "RTX 4090": Gpu(24, 165, 82.6),
    "RTX 5090": Gpu(32, 210, 104.8),
    "L40S": Gpu(48, 362, 91.6),
    "A100 40 GB": Gpu(40, 312, 19.5),
    "A100 80 GB": Gpu(80, 312, 19.5),
    "H100 SXM": Gpu(80, 989, 67.0),
}
