"""Measures of the identity benchmark that are not the examiner's own: what colour alone tells, Fréchet distance,
balanced accuracy, copying of the reference, the cost of branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from examples.small_model.drawing import People
from examples.small_model.evaluate import REFERENCES
from examples.small_model.people import ATTRIBUTES, Scene
from feedface_core.modules.adapter import FaceAdapter

ON_THE_FACE = ("expression", "glasses", "headwear")
ENOUGH = 200  # pictures for a Fréchet distance: with fewer, the covariances of 64 features say more of their number


def face_colors(people: People, index: Sequence[int]) -> np.ndarray:
    """Median colour ``(N, 3)`` of the lower half of each face, in −1…1."""
    colors = []
    for pixels, i in zip(people.pixels(index), index, strict=True):
        x0, y0, x1, y1 = people.records[i]["box"]
        left, right = (round(x0 + share * (x1 - x0)) for share in (0.3, 0.7))
        top, bottom = (round(y0 + share * (y1 - y0)) for share in (0.6, 0.9))
        inside = pixels[:, max(top, 0) : bottom, max(left, 0) : right]
        colors.append(np.median(inside.flatten(1).numpy(), 1))
    return np.stack(colors)


def told_by_color(people: People, identities: int) -> np.ndarray:
    """For each of the first people whether the three numbers of :func:`face_colors` of one reference are nearest to
    the mean of those of the person's own gallery, 0 or 1."""
    pictures = people.pictures_of(identities)
    asked = face_colors(people, pictures[:, 0])
    known = face_colors(people, pictures[:, REFERENCES:].ravel()).reshape(identities, -1, 3).mean(1)
    apart = ((asked[:, None] - known[None]) ** 2).sum(-1)  # (people, people)
    return (apart.argmin(1) == np.arange(identities)).astype(float)


def frechet(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Fréchet distance of two sets of features ``(N, D)`` (Heusel et al. 2017, eq. 6).

    Raises:
        ValueError: sets of different sizes; the estimate falls with N, so that only equal ones compare.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} features against {len(theirs)}: the distance depends on their number")
    one, other = np.cov(ours.astype(float), rowvar=False), np.cov(theirs.astype(float), rowvar=False)
    # the trace of the root of the product, whose eigenvalues are real and not negative but for rounding
    root = np.sqrt(np.linalg.eigvals(one @ other).real.clip(min=0)).sum()
    return float(((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(one) + np.trace(other) - 2 * root)


def balanced_accuracy(read: np.ndarray, wanted: np.ndarray) -> float:
    """Mean over the values of the share of their pictures that is read right: chance is 1 / values, however often
    each occurs."""
    return float(np.mean([(read[wanted == value] == value).mean() for value in np.unique(wanted)]))


def by_attribute(read: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Balanced accuracy of each attribute."""
    return {name: round(balanced_accuracy(read[name], numbers), 4) for name, numbers in wanted.items()}


def copied(read: Mapping[str, np.ndarray], scenes: Sequence[Scene], references: Sequence[Scene]) -> float:
    """Copy-paste: of all attributes on the face that differ between the scene asked for and the first reference, the
    share that is read as the reference's."""
    found = []
    for name in ON_THE_FACE:
        asked, shown = (np.array([ATTRIBUTES[name].index(one[name]) for one in many]) for many in (scenes, references))
        apart = asked != shown
        found.append((read[name] == shown)[apart])
    every = np.concatenate(found)
    return float(every.mean()) if len(every) else 0.0


def branch_gflop(adapter: FaceAdapter, references: int, unet: Mapping[str, Any]) -> float:
    """Operations (2 for a multiply-add, in 10⁹) of all branches for one picture in one step, counted from the shapes.

    ``unet`` is the U-Net's diffusers configuration.

    A branch of width C on N tokens with L face tokens: projections 4·N·C² (self) and 2·N·C² (cross), attention 2·N²·C
    and 2·N·L·C, MLP 12·N·C², last linear N·C²; of rank R, 2·N·C·R for a projection's N·C². Keys and values of the face
    are computed once a run and not counted.
    """
    total, face_tokens = 0.0, references * adapter.config.encoder.tokens
    for site in adapter.config.sites:
        n, c, config = tokens_at(site.name, unet), site.width, adapter.config
        linear = n * c * c if config.rank is None else 2 * n * c * config.rank
        own = 4 * linear + 2 * n * n * c if config.self_attention else 0
        total += own + 3 * linear + 2 * n * face_tokens * c + (12 * n * c * c if config.mlp else 0)
    return 2 * total / 1e9


def tokens_at(name: str, config: Mapping[str, Any]) -> int:
    """Picture tokens at a site of a U-Net with one block a level, from its diffusers configuration."""
    stage, number = name.split(".")[:2]
    lowest = len(config["block_out_channels"]) - 1
    levels = {"input_blocks": (int(number) - 1) // 2, "output_blocks": lowest - int(number) // 2}
    return (config["sample_size"] >> levels.get(stage, lowest)) ** 2
