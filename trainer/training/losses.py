"""The losses of FeedFace (ICLR 2024 Tiny Papers, section 2.3), for each sample on its own.

With d = target − prediction, d' = the frozen model's own prediction − prediction, and a face mask m in 0…1 over the
latent cells (C channels)::

    standard       mean(d²)
    mask           Σ(d²·m) / (C·Σm + ε)
    regularised    Σ(d²·m) / (C·Σm + ε)  +  Σ(d'²·(1 − m)) / (C·Σ(1 − m) + ε)

Dividing by the area makes a small face count as much as a large one; ``average`` divides by all cells instead, as
published. An all-zero mask leaves only the second term; an all-one mask only the first, which then is the standard
loss. Values may count differently (UniDiffuser's image token beside the picture): their importance is a factor of every
weight, and of every number that is divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

LossKind = Literal["standard", "mask", "regularised"]
Normalisation = Literal["area", "average"]
EPSILON = 1e-6


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
    weighted = ((prediction.float() - target.float()).square() * weights).flatten(1)  # (B, N)
    if normalise == "average":
        return weighted.mean(1) if importance is None else weighted.sum(1) / importance.flatten(1).sum(1)
    return weighted.sum(1) / (weights.flatten(1).sum(1) + EPSILON)


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
        kinds: one for each sample. They are known in Python, so nothing is read back from the device.
        original: the frozen model's prediction without gradient for the regularised samples, in their order.
        importance: how much each value counts, the same for all samples; None is 1 everywhere.

    Raises:
        ValueError: for a number of kinds or of original predictions that does not fit the batch.
    """
    if len(kinds) != prediction.shape[0]:
        raise ValueError(f"{len(kinds)} kinds of loss for {prediction.shape[0]} samples")
    found, wanted = 0 if original is None else original.shape[0], list(kinds).count("regularised")
    if found != wanted:
        raise ValueError(f"{found} predictions of the frozen model for {wanted} regularised samples")
    losses = prediction.new_zeros(len(kinds), dtype=torch.float32)  # (B,)
    everywhere = torch.ones(1, device=prediction.device)
    for own_kinds, goal, mask, divide in (
        (("standard",), target, None, "average"),
        (("mask", "regularised"), target, weights, normalise),
        (("regularised",), original, 1.0 - weights.float(), normalise),
    ):
        rows = [row for row, kind in enumerate(kinds) if kind in own_kinds]
        if rows:
            index = torch.tensor(rows, device=prediction.device)
            goal = goal if goal is original else goal[index]
            mask = everywhere if mask is None else mask[index]
            losses = losses.index_add(0, index, weighted_error(prediction[index], goal, mask, divide, importance))
    return losses


def identity_losses(
    found: Tensor, references: Tensor, own: Sequence[int], others: Sequence[Sequence[int]], temperature: float
) -> tuple[Tensor, Tensor]:
    """How far each face is from its references, and how near to other people's: each ``(N,)`` float32.

    With s the cosine to the own references and sⱼ to those of somebody else::

        likeness      1 − s
        contrastive   log(exp(s/τ) + Σⱼ exp(sⱼ/τ)) − s/τ     0 where there is nobody else (InfoNCE, Oord et al. 2018)

    Args:
        found: ``(N, D)`` unit vectors of the faces in the predicted pictures.
        references: ``(F, D)`` unit vectors, one for each face of the batch.
        own: for each of the N which of the F is its own.
        others: for each of the N those of the F that are other people.
        temperature: τ.
    """
    cosines = found.float() @ references.float().T  # (N, F)
    mine, asked = torch.zeros(cosines.shape), torch.zeros(cosines.shape, dtype=torch.bool)
    for row, (one, rivals) in enumerate(zip(own, others, strict=True)):
        mine[row, one], asked[row, [one, *rivals]] = 1.0, True
    likeness = (cosines * mine.to(cosines.device)).sum(1)
    logits = (cosines / temperature).masked_fill(~asked.to(cosines.device), -torch.inf)
    return 1.0 - likeness, torch.logsumexp(logits, dim=1) - likeness / temperature


def min_snr_weights(snr: Tensor, gamma: float, prediction: Literal["epsilon", "v"]) -> Tensor:
    """Min-SNR weights (Hang et al. 2023, section 3.4), ``(B,)``: ``min(SNR, γ) / SNR`` for ε, ``/ (SNR + 1)`` for v."""
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1.0) if prediction == "v" else capped / snr.clamp(min=1e-8)
