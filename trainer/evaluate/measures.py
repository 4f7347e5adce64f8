"""From what was seen in the pictures to the numbers of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .looking import Look, Looker, References
from .people import Request

Measures = Mapping[str, float]
"""Of a person or a picture; NaN where there is nothing to measure."""
FACE, UNMODIFIED = "face", "unmodified"
NAN = math.nan


@dataclass(frozen=True, eq=False)
class Scored:
    """A picture and its measures.

    Args:
        kind: :data:`FACE` or :data:`UNMODIFIED`.
        values: ``found`` (1 with a face that can be compared, else 0; NaN where no detector looked), ``similarity``
            (mean to the photos), ``unseen`` (mean to those that the adapter does not see), ``nearest`` (to the nearest
            photo), ``beyond`` (``nearest`` − the highest of any two photos of the person), ``copied`` (1 where that is
            above 0), ``clip_face``, ``clip_text``, ``reward``.
    """

    kind: str
    request: Request
    look: Look
    values: Measures


@dataclass(frozen=True, eq=False)
class PersonScores:
    """A person's photos and pictures.

    Args:
        limits: ``self`` (mean similarity of two photos), ``closest`` (highest of any two), ``floor`` (mean of photos to
            pictures of the unmodified model), ``chance`` (that one more photo is of the closest pair), and for
            ``clip_text`` and ``reward`` what the unmodified model's pictures reach (``…_high``) and the photos
            (``…_low``).
    """

    references: References
    pictures: tuple[Scored, ...]
    limits: Measures = field(default_factory=dict)

    def of(self, kind: str) -> list[Scored]:
        """The pictures of a kind that were asked for: in the same noise with and without the face."""
        return [one for one in self.pictures if one.kind == kind and one.request.round == 0]

    def mean(self, kind: str, measure: str) -> float:
        """Mean of a measure over the pictures of a kind that have it."""
        return mean(one.values[measure] for one in self.of(kind))


def mean(values: Any) -> float:
    """Mean of the numbers that are none of them NaN; NaN if there is no such."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else NAN


def score_person(
    references: References,
    looks: Mapping[str, Mapping[Request, Look]],
    looker: Looker,
    prompts: Mapping[str, np.ndarray],
) -> PersonScores:
    """Measure the pictures of a person.

    Args:
        looks: at the pictures of each kind.
        prompts: CLIP's embeddings of the prompts; empty without CLIP.
    """
    vectors = references.vectors
    pairs = looker.similarity(vectors, vectors)[np.triu_indices(len(vectors), 1)]
    highest = float(pairs.max()) if len(pairs) else NAN
    scored = tuple(
        Scored(kind, request, look, _measure(references, request, look, looker, highest, prompts))
        for kind, own in looks.items()
        for request, look in own.items()
    )
    plain = [one for one in scored if one.kind == UNMODIFIED]
    asked = list(dict.fromkeys(request.prompt for request in references.person.requests))
    limits = {
        "self": float(pairs.mean()) if len(pairs) else NAN,
        "closest": highest,
        "floor": mean(one.values["similarity"] for one in plain),
        "chance": 2.0 / (len(vectors) + 1) if len(pairs) else NAN,
        "clip_self": _clip_self(references),
        "clip_text_high": mean(one.values["clip_text"] for one in plain),
        "clip_text_low": mean(_text(prompts, prompt, look) for prompt in asked for look in references.looks),
        "reward_high": mean(one.values["reward"] for one in plain),
        "reward_low": mean(_reward(looker, prompt, look) for prompt in asked for look in references.looks),
    }
    return PersonScores(references, scored, limits)


def _measure(
    references: References,
    request: Request,
    look: Look,
    looker: Looker,
    highest: float,
    prompts: Mapping[str, np.ndarray],
) -> Measures:
    similarity = nearest = unseen = NAN
    if look.vector is not None:
        to_photos = looker.similarity([look.vector], references.vectors)[0]
        similarity, nearest = float(to_photos.mean()), float(to_photos.max())
        unseen = mean(to_photos[references.used :])
    beyond = nearest - highest
    faces = [own.clip_face for own in references.looks if own.clip_face is not None]
    return {
        "found": float(look.vector is not None) if looker.finds_faces else NAN,
        "similarity": similarity,
        "unseen": unseen,
        "nearest": nearest,
        "beyond": beyond,
        "copied": NAN if math.isnan(beyond) else float(beyond > 0),
        "clip_face": NAN if look.clip_face is None else float(np.mean(np.stack(faces) @ look.clip_face)),
        "clip_text": _text(prompts, request.prompt, look),
        "reward": _reward(looker, request.prompt, look),
    }


def _text(prompts: Mapping[str, np.ndarray], prompt: str, look: Look) -> float:
    return float(prompts[prompt] @ look.clip) if prompts else NAN


def _reward(looker: Looker, prompt: str, look: Look) -> float:
    return NAN if looker.reward is None else looker.rewards(prompt, look.path)


def _clip_self(references: References) -> float:
    faces = [look.clip_face for look in references.looks if look.clip_face is not None]
    if len(faces) < 2:
        return NAN
    return float((np.stack(faces) @ np.stack(faces).T)[np.triu_indices(len(faces), 1)].mean())


# --- the table ----------------------------------------------------------------------------------------------------

PER_PERSON = ("similarity", "unseen", "clip_face", "clip_text", "reward", "found", "copied", "beyond")
NORMALISED = {  # value, highest and lowest of each person
    "similarity_normalised": ("similarity", "self", "floor"),
    "clip_text_normalised": ("clip_text", "clip_text_high", "clip_text_low"),
    "reward_normalised": ("reward", "reward_high", "reward_low"),
}
MEASURES = (*PER_PERSON, *NORMALISED)


@dataclass(frozen=True)
class Estimate:
    """A mean over people with its 95 % interval, bootstrapped over people; None where nothing was measured, and no
    interval of fewer than two people.

    Args:
        people: that were measured.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    people: int = 0


def summarise(people: Sequence[PersonScores], kind: str, rounds: int) -> dict[str, Estimate]:
    """Every measure of a row of the table: each person counts the same, however many pictures there are."""
    result = {name: _estimate([[one.mean(kind, name)] for one in people], _plain, rounds) for name in PER_PERSON}
    for name, (value, high, low) in NORMALISED.items():
        rows = [[one.mean(kind, value), one.limits[high], one.limits[low]] for one in people]
        result[name] = _estimate(rows, normalise, rounds)
    return result


def summarise_photos(people: Sequence[PersonScores], rounds: int) -> dict[str, Estimate]:
    """The row of the photos themselves: what two photos of a person reach."""
    taken = {"similarity": "self", "clip_face": "clip_self", "clip_text": "clip_text_low", "reward": "reward_low"}
    taken["copied"] = "chance"
    return {name: _estimate([[one.limits[limit]] for one in people], _plain, rounds) for name, limit in taken.items()}


def _plain(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def normalise(means: np.ndarray) -> np.ndarray:
    """``(value − lowest) / (highest − lowest)`` of ``(…, 3)`` means over people in the order value, highest, lowest.

    The means are taken first: of one person the two ends may be as good as equal. NaN where they are equal or the wrong
    way round.
    """
    value, high, low = np.moveaxis(means, -1, 0)
    span = np.where(high - low > 1e-9, high - low, np.nan)
    return (value - low) / span


def _estimate(rows: list[list[float]], statistic: Callable[[np.ndarray], np.ndarray], rounds: int) -> Estimate:
    """Of people for whom nothing is NaN, a row each."""
    table = np.array(rows, dtype=float).reshape(len(rows), -1)
    known = table[~np.isnan(table).any(1)]
    if not len(known):
        return Estimate(None)
    value = float(statistic(known.mean(0)))
    if math.isnan(value):
        return Estimate(None, people=len(known))
    if len(known) < 2:
        return Estimate(value, people=len(known))
    drawn = np.random.default_rng(0).integers(len(known), size=(rounds, len(known)))
    again = statistic(known[drawn].mean(1))
    again = again[~np.isnan(again)]
    low, high = np.percentile(again, [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(known))
