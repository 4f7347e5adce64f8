"""Muon for matrices and convolutions, AdamW for the rest: fewer steps for small models than AdamW alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.config import OptimiserSettings


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix ``(R, C)`` with its singular values moved towards 1 (to within about 0.7…1.2), by Newton–Schulz
    iterations (Jordan et al. 2024)."""
    x = matrix.bfloat16() / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(iterations):
        gram = x @ x.T  # (R, R)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for linear ``(O, I)`` and convolution ``(O, I, h, w)``
    weights. ``torch.optim.Muon`` takes matrices only, and with AdamW for the convolutions the U-Net learns slower.

    The update of a weight, as a matrix (outputs × everything else), is made orthogonal and scaled by
    ``0.2·√max(rows, columns)``, so that a learning rate means the same as AdamW's (Liu et al. 2025, eq. 4).
    """

    def __init__(self, weights: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    mean = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    mean.lerp_(weight.grad, 1 - group["momentum"])
                    update = weight.grad.lerp(mean, group["momentum"]).reshape(len(weight), -1)
                    scale = 0.2 * max(update.shape) ** 0.5
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(orthogonalise(update).reshape(weight.shape), alpha=-group["lr"] * scale)


def make_optimisers(model: nn.Module, settings: OptimiserSettings) -> list[torch.optim.Optimizer]:
    """Muon for matrices and convolutions; AdamW without weight decay for embeddings, heads and vectors."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    muon, rest = [], []
    for name, weight in model.named_parameters():
        hidden = weight.ndim > 1 and id(weight) not in embeddings and "head" not in name
        (muon if hidden else rest).append(weight)
    return [
        Muon(muon, settings.lr, settings.weight_decay),
        torch.optim.AdamW(rest, settings.lr, settings.betas, weight_decay=0.0),
    ]
