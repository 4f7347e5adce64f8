"""Muon for linear and convolution weights, AdamW for the rest: fewer steps for small models than AdamW alone.

The momentum of a weight, as a matrix (outputs × everything else), is replaced by the nearest orthogonal matrix, found
with five Newton–Schulz iterations (Jordan et al. 2024), and scaled by ``0.2·√max(rows, columns)`` so that a learning
rate means the same as AdamW's (Liu et al. 2025, eq. 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix ``(R, C)`` with its singular values moved towards 1 (to within about 0.7…1.2)."""
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(iterations):
        gram = x @ x.T  # (R, R)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for weights of two or more dimensions.

    Args:
        weights: linear ``(O, I)`` or convolution ``(O, I, h, w)`` weights.
        lr: learning rate, as for AdamW.
        momentum: decay of the running mean of gradients.
    """

    def __init__(self, weights, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                mean = state.setdefault("momentum", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(mean, group["momentum"]).reshape(len(weight), -1)
                scale = 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonalise(update).reshape(weight.shape), alpha=-group["lr"] * scale)
