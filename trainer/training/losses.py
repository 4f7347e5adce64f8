"""The losses of FeedFace (ICLR 2024 Tiny Papers, section 2.3), for each sample on its own.

With d = target − prediction, d' = the frozen model's own prediction − prediction, and a face mask m in 0…1
over the latent cells (C channels)::

    standard       mean(d²)
    mask           Σ(d²·m) / (C·Σm + ε)
    regularised    Σ(d²·m) / (C·Σm + ε)  +  Σ(d'²·(1 − m)) / (C·Σ(1 − m) + ε)

Dividing by the area makes a small face count as much as a large one; ``average`` divides by all cells
instead, as published. An all-zero mask leaves only the second term, an all-one mask only the first, which
then is the standard loss. Values may count differently (UniDiffuser's image token beside the picture): their
importance is a factor of every weight, and of every number that is divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

LossKind = Literal["standard", "mask", "regularised"]
Normalisation = Literal["area", "average"]
KINDS: tuple[LossKind, ...] = ("standard", "mask", "regularised")
EPSILON = 1e-6


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)  # (B, everything)


def weighted_error(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor,
    normalise: Normalisation = "area",
    importance: Tensor | None = None,
) -> Tensor:
    """Squared error under weights, for each sample: ``(B,)``.

    Args:
        prediction, target: ``(B, …)``.
        weights: 0…1, broadcasting to the prediction's shape, such as ``(B, 1, h, w)``.
        normalise: ``area`` divides by the sum of the weights, ``average`` by the number of values.
        importance: how much each value counts, broadcasting likewise; None is 1 everywhere.
    """
    weights = weights.float().expand_as(prediction)
    if importance is not None:
        importance = importance.float().expand_as(prediction)
        weights = weights * importance
    weighted = _flat((prediction.float() - target.float()).square() * weights)  # (B, N)
    if normalise == "average":
        return weighted.mean(1) if importance is None else weighted.sum(1) / _flat(importance).sum(1)
    return weighted.sum(1) / (_flat(weights).sum(1) + EPSILON)


def sample_losses(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor,
    kinds: Sequence[LossKind],
    original: Tensor | None = None,
    normalise: Normalisation = "area",
    importance: Tensor | None = None,
) -> Tensor:
    """The loss of each sample, of the kind drawn for it: ``(B,)`` float32.

    Args:
        prediction, target: ``(B, …)``.
        weights: the face mask, broadcasting to the prediction's shape.
        kinds: one of :data:`KINDS` for each sample. They are known in Python, so nothing is read back from
            the device.
        original: the frozen model's prediction without gradient for the regularised samples, in their order.
        importance: how much each value counts, the same for all samples; None is 1 everywhere.

    Raises:
        ValueError: for a number of kinds or of original predictions that does not fit the batch.
    """
    if len(kinds) != prediction.shape[0]:
        raise ValueError(f"{len(kinds)} kinds of loss for {prediction.shape[0]} samples")
    rows = {kind: [row for row, own in enumerate(kinds) if own == kind] for kind in KINDS}
    regularised = rows["regularised"]
    given = 0 if original is None else original.shape[0]
    if given != len(regularised):
        raise ValueError(f"{given} predictions of the frozen model for {len(regularised)} regularised samples")
    losses = prediction.new_zeros(len(kinds), dtype=torch.float32)  # (B,)
    if rows["standard"]:
        index = _index(rows["standard"], prediction)
        ones = torch.ones(1, device=prediction.device)
        error = weighted_error(prediction[index], target[index], ones, "average", importance)
        losses = losses.index_add(0, index, error)
    masked = sorted(rows["mask"] + regularised)
    if masked:
        index = _index(masked, prediction)
        error = weighted_error(prediction[index], target[index], weights[index], normalise, importance)
        losses = losses.index_add(0, index, error)
    if regularised:
        index = _index(regularised, prediction)
        error = weighted_error(prediction[index], original, 1.0 - weights[index].float(), normalise, importance)
        losses = losses.index_add(0, index, error)
    return losses


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


def min_snr_weights(snr: Tensor, gamma: float, prediction: Literal["epsilon", "v"]) -> Tensor:
    """Min-SNR weights (Hang et al. 2023, section 3.4), ``(B,)``: ``min(SNR, γ) / SNR`` for ε, ``/ (SNR + 1)``
    for v.
    """
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1.0) if prediction == "v" else capped / snr.clamp(min=1e-8)
