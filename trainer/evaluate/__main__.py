"""``python -m trainer.evaluate PEOPLE OUTPUT [setting=value …]``: how alike, how true to the prompt, how much pasted.

    python -m trainer.evaluate people.json evaluation adapter=face.safetensors model.base=sd15.safetensors
    python -m trainer.evaluate people.json evaluation --pictures queue_output

PEOPLE is people × prompts as for ``python run.py queue``, a manifest, or a folder of photos such as PPR10K. Run again,
it goes on where it stopped: pictures that are there are not drawn again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feedface_core.faces.recognisers import Recogniser

from ..config import EvaluateSettings
from ..config.evaluation import QUICK
from ..config.fields import make_folder
from ..errors import TrainerError, exit_code
from .drawing import Painter
from .elsewhere import find_pictures
from .looking import Look, Looker, References, look_at_photos
from .measures import FACE, UNMODIFIED, score_person
from .memo import Memo
from .people import Person, Request, all_requests, read_people
from .report import markdown, results_of, write_results
from .sheet import contact_sheet, plots
from .subject import Subject

logger = logging.getLogger(__name__)

LOCK, MEMO = "evaluate.lock", "memo.jsonl"
Made = dict[str, dict[Request, Path]]
"""The files of each kind of pictures."""


def evaluate(settings: EvaluateSettings, recogniser: Recogniser | None = None) -> dict[str, Any]:
    """Draw or find the pictures, measure them, and write tables, plots and the contact sheet.

    Args:
        recogniser: compares the faces in place of the settings'.

    Returns:
        What ``results.json`` holds.

    Raises:
        FeedFaceError: an input, model or output folder that cannot be used; what concerns the input before anything is
            drawn.
    """
    from filelock import FileLock, Timeout

    people = read_people(settings)
    output = make_folder(settings.output, "output")
    try:  # the system lets go of the lock however this process ends
        with FileLock(output / LOCK, timeout=0):
            return _evaluate(settings, people, output, recogniser)
    except Timeout as error:
        raise TrainerError(f"{output}: another trainer.evaluate is writing to this folder") from error


def _evaluate(
    settings: EvaluateSettings, people: list[Person], output: Path, recogniser: Recogniser | None
) -> dict[str, Any]:
    made: Made = {}
    for kind, folder in ((FACE, "pictures"), (UNMODIFIED, "unmodified_pictures")):
        if (given := getattr(settings, folder)) is not None:
            made[kind] = find_pictures(given, all_requests(people), settings.missing, folder)
    memo = Memo(output / MEMO)
    subject = None if settings.adapter is None else Subject(settings, output)
    encoder = subject.recogniser() if settings.recogniser == "encoder" and recogniser is None else None
    looker = Looker(settings, memo, encoder, recogniser)
    used = settings.references if subject is None else min(settings.references, subject.config.max_references)
    for path in _counted([path for files in made.values() for path in files.values()], "pictures made elsewhere"):
        looker(path)  # before hours of drawing, for one that cannot be read
    painter = _painter(settings, subject, made, output, memo)
    references = [look_at_photos(person, looker, used) for person in _counted(people, "photos of people")]
    if painter is not None:
        _draw(painter, settings, references, made)
    prompts = _prompts(looker, people)
    scored = [
        score_person(own, _looks(made, own.person.name, looker), looker, prompts)
        for own in _counted(references, "people measured")
    ]
    seconds = {} if painter is None else painter.seconds
    described = {
        "title": subject.name if subject is not None else Path(settings.pictures).name,
        "detector": looker.detector.description,
        "recogniser": looker.recogniser.name,
        "clip": looker.clip and looker.clip.name,
        "pictures": len(made[FACE]),
        "minutes": {kind: round(seconds[kind] / 60, 2) for kind in sorted(seconds)},
        "notes": _notes(references, made, settings, looker),
        "settings": settings.model_dump(mode="json"),
    }
    results = results_of(scored, settings.bootstrap, described)
    write_results(results, scored, output)
    contact_sheet(scored, output)
    if plots(scored, looker.recogniser.name, output) is None:
        logger.info('no plots: matplotlib is missing; "pip install matplotlib"')
    return results


def _looks(made: Made, person: str, looker: Looker) -> dict[str, dict[Request, Look]]:
    """What is seen in the pictures of a person, of each kind."""
    return {
        kind: {request: looker(path) for request, path in files.items() if request.person == person}
        for kind, files in made.items()
    }


def _painter(
    settings: EvaluateSettings, subject: Subject | None, made: Made, output: Path, memo: Memo
) -> Painter | None:
    """Who draws what was not made elsewhere; None if that is nothing."""
    plain = settings.model.base is not None and settings.unmodified > 0
    if FACE in made and (UNMODIFIED in made or not plain):
        return None
    return Painter(settings, None if FACE in made else subject, output, memo)


def _draw(painter: Painter, settings: EvaluateSettings, references: Sequence[References], made: Made) -> None:
    """Draw what was not made elsewhere."""
    wanted = [kind for kind in (FACE, UNMODIFIED) if kind not in made and (kind == FACE or settings.unmodified)]
    made |= {kind: {} for kind in wanted}
    for own in _counted(references, "people drawn"):
        if FACE in wanted:
            made[FACE] |= painter.with_face(own)
        if UNMODIFIED in wanted:
            made[UNMODIFIED] |= painter.unmodified(own.person.unmodified(settings.unmodified))
    painter.frozen.release("host", "autoencoder")


def _prompts(looker: Looker, people: Sequence[Person]) -> Mapping[str, np.ndarray]:
    """CLIP's embeddings of all prompts; empty without CLIP."""
    if looker.clip is None:
        return {}
    prompts = list(dict.fromkeys(request.prompt for request in all_requests(people)))
    embedded = torch.cat([looker.clip.texts(prompts[start : start + 64]) for start in range(0, len(prompts), 64)])
    return dict(zip(prompts, embedded.numpy(), strict=True))


def _notes(references: Sequence[References], made: Made, settings: EvaluateSettings, looker: Looker) -> list[str]:
    """What the numbers leave out."""
    notes = []
    if without := sum(len(own.without_face) for own in references):
        notes.append(f"{without} photos without a face that can be compared are left out.")
    if alone := [own.person.name for own in references if len(own.looks) < 2]:
        notes.append(f"{len(alone)} people have one photo: nothing is normalised for them, and copies cannot be told.")
    if UNMODIFIED not in made:
        notes.append("Nothing is normalised: there are no pictures of the unmodified model (model.base, unmodified).")
    if absent := sum(len(own.person.requests) for own in references) - len(made[FACE]):
        notes.append(f"{absent} pictures are missing, and left out (missing=skip).")
    if not looker.finds_faces:
        notes.append("No detector looked: the whole picture, or the box of the manifest, is the face.")
    if settings.recogniser == "encoder":
        notes.append("The recogniser is the adapter's own encoder, through which it sees the photos: no fair judge.")
    return notes


def _counted(items: Sequence[Any], unit: str) -> Any:
    """The items, with a bar on a terminal."""
    from tqdm import tqdm

    return tqdm(items, unit=f" {unit}", disable=None)


def parse(arguments: Sequence[str] | None = None) -> EvaluateSettings:
    """The settings that a command line names.

    Raises:
        TrainerError: see :meth:`EvaluateSettings.load`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description="The published evaluation: likeness, prompt, and whether the face is pasted.",
        epilog="Settings (setting=value):\n" + EvaluateSettings.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("people", help="people × prompts: a file or folder as for the queue, a manifest, or photos")
    parser.add_argument("output", help="folder of pictures, tables and plots")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    parser.add_argument("--config", help="a YAML file with settings")
    parser.add_argument("--photos", help="folder of the photos (default: that of the file)")
    parser.add_argument("--pictures", help="pictures made elsewhere, such as the queue's output folder")
    quick = " ".join(f"{name}={value}" for name, value in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"a look in minutes: {quick}")
    options = parser.parse_intermixed_args(arguments)
    if "=" in options.output:
        parser.error(f"OUTPUT, the folder to write to, comes second; found the setting {options.output!r}")
    named = {name: getattr(options, name) for name in ("people", "output", "photos", "pictures")}
    values = list(options.settings)
    if options.quick:
        given = {value.partition("=")[0] for value in values}
        values += [f"{name}={value}" for name, value in QUICK.items() if name not in given]
    return EvaluateSettings.load(
        options.config, values, **{name: value for name, value in named.items() if value is not None}
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when evaluated, 1 for an error of the input, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def run() -> None:
        settings = parse(arguments)
        results = evaluate(settings)
        print(markdown(results))
        print(f"written: {Path(settings.output) / 'results.md'}; look at {Path(settings.output) / 'contact_sheet.png'}")

    try:
        return exit_code(run)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
