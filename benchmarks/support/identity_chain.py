"""Where a feature of the person is lost on the way from the reference to the picture.

For each feature three balanced accuracies for people that nothing was trained on: of a linear probe on the encoder's
hidden states, of one on the face tokens behind the projection, and of the examiner on the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.support.identity_measures import balanced_accuracy
from examples.small_model.drawing import People
from examples.small_model.evaluate import Examination, Readings, SmallModel
from examples.small_model.people import FEATURES

LEARNT = 2  # pictures of each person that the probes learn from
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


def probe(known: Tensor, values: Mapping[str, np.ndarray], asked: Tensor) -> dict[str, np.ndarray]:
    """Linear probes: ridge regression on one-hot values, solved in the dual; each penalty is chosen on a fifth of the
    known.

    Args:
        known: ``(N, D)`` states, with the ``values`` ``(N,)`` of each feature.
        asked: ``(M, D)``.

    Returns:
        The values told of each feature, ``(M,)``.
    """
    mean, scale = known.mean(0), known.std(0).clamp(min=1e-4)
    known, asked = ((states - mean) / scale for states in (known, asked))
    kernel, cross = (states @ known.T / known.shape[1] for states in (known, asked))
    numbered = {name: np.unique(those, return_inverse=True) for name, those in values.items()}
    targets, cut = {}, len(known) * 4 // 5
    for name, (names, numbers) in numbered.items():
        target = F.one_hot(torch.from_numpy(numbers), len(names)).float()
        targets[name] = target / target.mean(0).sqrt()  # rare values count as much as frequent ones
    told: dict[str, tuple[float, np.ndarray]] = {name: (-1.0, np.empty(0)) for name in values}
    for penalty in PENALTIES:
        part, whole = (torch.linalg.cholesky(kernel[:n, :n] + penalty * torch.eye(n)) for n in (cut, len(known)))
        for name, (names, numbers) in numbered.items():
            held_back = (kernel[cut:, :cut] @ torch.cholesky_solve(targets[name][:cut], part)).argmax(1).numpy()
            right = balanced_accuracy(held_back, numbers[cut:])
            if right > told[name][0]:
                answer = (cross @ torch.cholesky_solve(targets[name], whole)).argmax(1).numpy()
                told[name] = right, names[answer]
    return {name: answer for name, (_, answer) in told.items()}


@torch.no_grad()
def chain(
    model: SmallModel,
    examination: Examination,
    learnt: People,
    people: People,
    persons: Sequence[int],
    drawn: Readings,
    references: Sequence[int],
    decoded: Readings,
) -> list[dict]:
    """A line for each feature: ``encoder``, ``projection``, ``picture``, and ``ceiling``, what the examiner reads from
    references through the autoencoder, or None; ``chance`` is 1 / values among the people.

    Args:
        learnt: people whom the probes learn from; neither the encoder nor the adapter was trained on them.
        people: the held-out ones.
        persons: whom each generated picture shows; their first pictures were the references.
        drawn: what the judges say of the generated pictures.
        references, decoded: indices of drawings, and what the judges say of them through the autoencoder.
    """

    def shown(one: People, index: Sequence[int], name: str) -> np.ndarray:
        return np.array([one.records[i]["features"][name] for i in index])

    index = learnt.pictures_of(len(set(learnt.identities())))[:, :LEARNT].ravel()
    first = people.pictures_of(len(set(people.identities())))[:, 0]
    known, asked = model.encode_faces(learnt, index), model.encode_faces(people, first)
    links = {"encoder": (known, asked), "projection": (model.adapter.project(known), model.adapter.project(asked))}
    values = {name: shown(learnt, index, name) for name in FEATURES}
    told = {link: probe(ours.flatten(1), values, theirs.flatten(1)) for link, (ours, theirs) in links.items()}
    lines = []
    for name in FEATURES:
        wanted = shown(people, first, name)
        line = {"feature": name, "chance": 1 / len(set(wanted))}
        line |= {link: balanced_accuracy(told[link][name], wanted) for link in links}
        line |= {"picture": None, "ceiling": None}
        if name in drawn.features:
            names = np.array(examination.judges.examiner.values[name])
            line["picture"] = balanced_accuracy(names[drawn.features[name]], wanted[list(persons)])
            line["ceiling"] = balanced_accuracy(names[decoded.features[name]], shown(people, references, name))
        lines.append({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()})
    return lines
