"""The results as files: JSON with everything, CSV with a line a picture, a Markdown table beside the published rows."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from feedface_core.files.atomic import replacing

from ..errors import TrainerError
from .measures import FACE, UNMODIFIED, Estimate, PersonScores, summarise, summarise_photos

#: 36 identities of PPR10K with 5 to 8 prompts each; FeedFace on UniDiffuser (ICLR 2024 Tiny Papers).
PUBLISHED = {
    "FeedFace, published": {
        "similarity_normalised": 0.293,
        "clip_face": 0.818,
        "clip_text": 0.298,
        "reward_normalised": 0.760,
        "minutes": 22,
    },
    "DreamBooth, published": {
        "similarity_normalised": 0.176,
        "clip_face": 0.718,
        "clip_text": 0.316,
        "reward_normalised": 0.878,
        "minutes": 72,
    },
}
COLUMNS = {
    "similarity": "similarity",
    "similarity_normalised": "similarity, normalised",
    "unseen": "to unseen photos",
    "clip_face": "CLIP face",
    "clip_text": "CLIP text",
    "clip_text_normalised": "CLIP text, normalised",
    "reward": "ImageReward",
    "reward_normalised": "ImageReward, normalised",
    "found": "face found",
    "copied": "nearer than photos",
    "beyond": "by",
}
TITLES = {FACE: "with the face", UNMODIFIED: "no face, same noise", "photos": "the photos themselves"}
PUBLISHED_RECOGNISER = "insightface"


def results_of(people: Sequence[PersonScores], rounds: int, described: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that ``results.json`` holds.

    Args:
        described: settings, detector, recogniser and the like.
    """
    kinds = [kind for kind in (FACE, UNMODIFIED) if any(one.of(kind) for one in people)]
    rows = {kind: summarise(people, kind, rounds) for kind in kinds} | {"photos": summarise_photos(people, rounds)}
    return {
        **described,
        "rows": {kind: {name: asdict(one) for name, one in row.items()} for kind, row in rows.items()},
        "published": PUBLISHED,
        "people": [_person(one, kinds) for one in people],
    }


def _person(one: PersonScores, kinds: Sequence[str]) -> dict[str, Any]:
    found = {
        "id": one.references.person.name,
        "photos": [look.path.name for look in one.references.looks],
        "seen_by_the_adapter": one.references.used,
        "photos_without_a_face": [path.name for path in one.references.without_face],
        "unmodified_pictures": sum(picture.kind == UNMODIFIED for picture in one.pictures),
        "limits": _known(one.limits),
    }
    for kind in kinds:
        found[kind] = _known({name: one.mean(kind, name) for name in COLUMNS if not name.endswith("_normalised")})
    return found


def _known(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items() if not math.isnan(value)}


def write_results(results: Mapping[str, Any], people: Sequence[PersonScores], output: Path) -> None:
    """``results.json``, ``results.csv`` and ``results.md``, each in one piece.

    Raises:
        TrainerError: one cannot be written.
    """
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _write(output / "results.json", lambda file: file.write(text))
    _write(output / "results.csv", lambda file: _write_pictures(people, output, file))
    _write(output / "results.md", lambda file: file.write(markdown(results)))


def _write(path: Path, write: Callable[[TextIO], Any]) -> None:
    try:
        with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
            write(file)
    except OSError as error:
        raise TrainerError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write_pictures(people: Sequence[PersonScores], output: Path, file: TextIO) -> None:
    rows = [(person, picture) for person in people for picture in person.pictures]
    measures = list(rows[0][1].values) if rows else []
    writer = csv.writer(file)
    writer.writerow(["person", "kind", "prompt", "seed", "round", "file", "box", *measures])
    for person, picture in rows:
        path, face = picture.look.path, picture.look.face
        shown = path.relative_to(output) if path.is_relative_to(output) else path
        box = "" if face is None else " ".join(f"{value:.1f}" for value in face.box)
        values = [picture.values[name] for name in measures]
        writer.writerow(
            [person.references.person.name, picture.kind, picture.request.prompt, picture.request.seed]
            + [picture.request.round, shown.as_posix(), box]
            + ["" if math.isnan(value) else round(value, 6) for value in values]
        )


def markdown(results: Mapping[str, Any]) -> str:
    """The table to read, and what it has to be read with."""
    shown = [name for name in COLUMNS if any(_value(row, name) is not None for row in results["rows"].values())]
    shown = [name for name in COLUMNS if name in shown or any(name in row for row in PUBLISHED.values())]
    recogniser, minutes = results["recogniser"], results.get("minutes") or {}
    lines = [
        f"# Evaluation: {results['title']}",
        "",
        f"{len(results['people'])} people, {results['pictures']} pictures. Faces are found by {results['detector']} "
        f"and compared by **{recogniser}**. In brackets 95 % intervals, bootstrapped over people.",
        "",
        "| | compared by | " + " | ".join(COLUMNS[name] for name in shown) + " | minutes |",
        "| --- | --- | " + "---: | " * (len(shown) + 1),
    ]
    for kind, row in results["rows"].items():
        cells = [_cell(row.get(name)) for name in shown]
        took = f"{minutes[kind]:.2g}" if minutes.get(kind) else "–"
        lines.append(f"| {TITLES[kind]} | {recogniser} | " + " | ".join(cells) + f" | {took} |")
    same = recogniser.startswith(PUBLISHED_RECOGNISER)
    for name, values in PUBLISHED.items():
        cells = [f"{values[column]:.3f}" if column in values else "–" for column in shown]
        judge = "InsightFace" + ("" if same else " ¹")
        lines.append(f"| {name} | {judge} | " + " | ".join(cells) + f" | {values['minutes']} |")
    return "\n".join([*lines, "", *_notes(results, same)]) + "\n"


def _notes(results: Mapping[str, Any], same: bool) -> list[str]:
    notes = [
        "- similarity: of a picture's largest face to each of the person's photos, mean. normalised: (s − min) / (max "
        "− min), max between two photos of the person, min between the photos and pictures of the unmodified model.",
        "- CLIP text and ImageReward, normalised: max is the unmodified model, min the photos under the same prompts.",
        "- nearer than photos: share of pictures that are nearer to some photo of the person than any two photos to "
        "each other; by: how much on average (below 0: not as near). One more photo of the person is by chance in 2 "
        "of (photos + 1) cases: that is the photos' row; an adapter that pastes is above it.",
        "- similarities are of the pictures in which a face was found.",
        "- published: 36 people of PPR10K, 5 to 8 prompts each, on UniDiffuser; other people, prompts or bases give "
        "other numbers for the same method.",
    ]
    if not same:
        notes.append(
            f"- ¹ other recogniser: similarities of InsightFace and {results['recogniser']} are not comparable, "
            "normalised or not."
        )
    return notes + [f"- {note}" for note in results.get("notes", [])]


def _value(row: Mapping[str, Any], name: str) -> float | None:
    return (row.get(name) or {}).get("value")


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "–"
    one = Estimate(**estimate)
    return f"{one.value:.3f}" + ("" if one.low is None else f" [{one.low:.3f}, {one.high:.3f}]")
