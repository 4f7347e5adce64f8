"""Identity guidance in the benchmark: what FeedFace Identity Guidance does, with the trainer's sampler.

The head is where the mask reader, one of the judges, sees it in the predicted picture; in ComfyUI a detector or the
user says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from examples.small_model.evaluate import Examination, SmallModel
from feedface_core.faces import Box, cut_squares, square_box
from feedface_core.modules.likeness import EncoderLikeness, mean_vectors, pull

START, EVERY = 0.3, 2  # share of the steps at which it begins, and steps from one pull to the next
SMALLEST = 8  # pixels of a head's sides


def head_boxes(masks: Tensor) -> list[Box | None]:
    """The box around each of the masks ``(N, 1, S, S)``; None for hardly any head."""
    boxes: list[Box | None] = []
    for mask in masks[:, 0] > 0.5:
        rows, columns = torch.where(mask)
        box = None
        if len(rows):
            found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            box = tuple(float(value) for value in found)
        boxes.append(box if box and min(box[2] - box[0], box[3] - box[1]) >= SMALLEST else None)
    return boxes


def pulling(
    model: SmallModel, judges: Examination, hidden: Tensor, scale: float, steps: int
) -> Callable[[Tensor, int], Tensor]:
    """What :func:`trainer.training.sampling.sample` calls with the predicted clean latents of N pictures.

    Args:
        hidden: ``(N, references, T, E)`` of each picture's person.
        scale: as of the node.
        steps: of the sampler.
    """
    frozen, settings = model.frozen, model.encoder_config
    likeness = EncoderLikeness(model.encoder, settings)
    references = mean_vectors(likeness.of_hidden(hidden.flatten(0, 1)), [hidden.shape[1]] * len(hidden))

    def change(clean: Tensor, number: int) -> Tensor:
        if number < START * steps or number % EVERY:
            return clean
        boxes = head_boxes(judges.heads(frozen.decode(clean)))
        rows = [row for row, box in enumerate(boxes) if box is not None]
        if not rows:
            return clean
        squares = [square_box(boxes[row], settings.crop_scale) for row in rows]
        moved = clean.float()
        moved[rows], _ = pull(
            moved[rows], lambda latents: crops(latents, squares), likeness, references[rows], distances(clean, squares)
        )
        return moved

    def crops(latents: Tensor, squares: Sequence[Box]) -> Tensor:
        return cut_squares((frozen.decode(latents, gradient=True) + 1) / 2, squares, likeness.size, settings.crop_fill)

    def distances(clean: Tensor, squares: Sequence[Box]) -> list[float]:
        return [scale * math.sqrt(clean.shape[1]) * (square[2] - square[0]) / frozen.cell for square in squares]

    return change
