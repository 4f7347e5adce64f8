"""What the examiner goes by: strangers who are given one feature of a person after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from examples.small_model import system
from examples.small_model.drawing import draw, install_renderer, parts_of, render, to_pixels
from examples.small_model.evaluate import Request
from examples.small_model.people import identity, picture
from examples.small_model.settings import PeopleSettings

WITHOUT_COLORS = "everything but colours"
COLORS = (("body", "color"), ("hair", "color"))
RUNGS = {
    "a stranger": (),
    "skin": (("body", "color"),),
    "hair color": (("hair", "color"),),
    "hair style": (("hair", "id"), ("hair", "flip"), ("hairBg", "id")),
    "beard": (("facialHair", "id"),),
    "head shape": (("head", "id"), ("head", "shave"), ("fatness",)),
    "eyes and brows": (("eye", "id"), ("eye", "angle"), ("eyebrow", "id"), ("eyebrow", "angle")),
}
"""What a stranger is given at each rung, on top of the rungs before."""


def give(stranger: dict, person: dict, features: Sequence[tuple[str, ...]]) -> dict:
    """A stranger with some features of a person; each is a path into a facesjs configuration."""
    mixed = json.loads(json.dumps(stranger))
    for path in features:
        theirs, ours = mixed, person
        for key in path[:-1]:
            theirs, ours = theirs[key], ours[key]
        theirs[path[-1]] = ours[path[-1]]
    return mixed


def rungs() -> dict[str, list[tuple[str, ...]]]:
    """Everything that a stranger has been given at each rung."""
    given: dict[str, list[tuple[str, ...]]] = {}
    so_far: list[tuple[str, ...]] = []
    for name, features in RUNGS.items():
        so_far = [*so_far, *features]
        given[name if not features else f"+ {name}"] = so_far
    return given


def draw_ladder(settings: PeopleSettings, split: str, asked: Sequence[Request], root: Path) -> dict[str, Tensor]:
    """Pictures ``(N, 3, S, S)`` in −1…1 for each rung, in the scenes of ``asked``, drawn with Node.js.

    The last one is the person with the colours of the stranger.

    Args:
        settings, split: of the people; strangers are the people of the split ``second`` or, for those, ``heldout``.
        root: folder of the drawn people, with the renderer.
    """
    renderer = install_renderer(root / "renderer")
    parts = parts_of(renderer)
    strangers = "heldout" if split.startswith("second") else "second"
    pairs = [
        (identity(parts, settings, split, r.person), identity(parts, settings, strangers, r.person)) for r in asked
    ]
    people = {name: [give(s, p, features) for p, s in pairs] for name, features in rungs().items()}
    people[WITHOUT_COLORS] = [give(p, s, COLORS) for p, s in pairs]
    size = {"size": 2 * settings.size, "mask_size": settings.size}
    drawn = {}
    for name, faces in people.items():
        specs = []
        for face, request in zip(faces, asked, strict=True):
            spec, _ = picture(face, request.scene, settings, np.random.default_rng([88, request.seed]))
            specs.append(spec | size)
        drawn[name] = to_pixels(render(renderer, specs)[0])
    return drawn


def draw_people(work: Path, folder: Path, splits: Sequence[str], log: Callable[[str], None]) -> None:
    """Draws people with the settings of a model in ``folder``, unless they are there (needs Node.js)."""
    chosen = system.people_settings(folder)
    absent = [split for split in splits if not (work / "people" / split / "manifest.jsonl").is_file()]
    if absent:
        draw(work / "people", chosen, absent, log=log)
