"""The published evaluation on the small model: ``python -m examples.small_model.protocol OUTPUT [setting=value …]``.

The people are the held-out ones of the benchmark, drawn where they are not there yet (needs Node.js): four drawings of
each are references. The prompts are scenes of their own. The examiner, which never conditions anything, compares whole
pictures. Settings are those of ``python -m trainer.evaluate``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from feedface_core.faces import DetectedFace
from feedface_core.faces.recognisers import Recogniser
from trainer.config import EvaluateSettings
from trainer.config.evaluation import QUICK
from trainer.config.fields import make_folder
from trainer.data.manifest import write_rows
from trainer.errors import exit_code
from trainer.evaluate.__main__ import evaluate
from trainer.evaluate.report import markdown
from trainer.models.precision import fastest_precision

from . import system
from .build import WORK
from .drawing import People, draw
from .evaluate import requests
from .people import caption

SETTINGS = {
    "detect.detector": "whole image",
    "references": 4,
    "sampling.steps": 20,
    "sampling.batch_size": 8,
    "sampling.text_scale": 2.0,
}
"""In place of the defaults: no detector finds all drawn people, and a small model wants less guidance."""


class ExaminerRecogniser(Recogniser):
    """The small model's examiner, which looks at whole pictures.

    Args:
        folder: the small model.
    """

    name, licence, install = "the examiner", "as the project", "python -m examples.small_model.build recogniser"
    same = distance = float("nan")

    def __init__(self, folder: Path = system.FOLDER) -> None:
        self.examiner = system.load_examiner(folder).examiner
        self.centre = load_file(folder / "examiner" / "gallery.safetensors")["centre"].float()

    @torch.no_grad()
    def vectors(self, image: Tensor, faces: Sequence[DetectedFace]) -> list[Tensor | None]:
        """The picture's embedding ``(128,)`` from the mean of all people's, for every face."""
        embedding = self.examiner(image.movedim(-1, 0)[None] * 2.0 - 1.0).identity[0] - self.centre
        return [embedding] * len(faces)


def write_people(drawn: People, people: int, prompts: int, path: Path) -> None:
    """A manifest of the first people: their drawings, with the captions of other scenes as prompts."""
    index, asked = drawn.pictures_of(people), requests(people, prompts)
    rows = []
    for person, pictures in enumerate(index):
        captions = [caption(request.scene) for request in asked if request.person == person]
        for number, picture in enumerate(pictures):
            record = drawn.records[picture]
            rows.append(
                {
                    "id": record["id"],
                    "path": str((drawn.folder / record["path"]).resolve()),
                    "bbox": record["box"],
                    "identity": record["identity"],
                    "caption": captions[number] if number < len(captions) else "",
                }
            )
    write_rows(path, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.small_model.protocol", description=__doc__.splitlines()[0]
    )
    parser.add_argument("output", help="folder of pictures, tables and plots")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    parser.add_argument("--quick", action="store_true", help="three people, in a minute")
    parser.add_argument("--model", type=Path, default=system.FOLDER, help="the small model")
    parser.add_argument("--work", type=Path, default=WORK, help="where the drawn people are, or are drawn")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def run() -> None:
        output = make_folder(options.output, "output")
        chosen = {**SETTINGS, "model.base": options.model, "model.precision": fastest_precision()}
        chosen["adapter"] = options.model / system.ADAPTER
        chosen |= QUICK if options.quick else {}
        given = {one.partition("=")[0] for one in options.settings}
        values = [*options.settings, *(f"{name}={value}" for name, value in chosen.items() if name not in given)]
        settings = EvaluateSettings.load(None, values, people=str(output / "people.jsonl"), output=str(output))
        if not (options.work / "people" / "heldout" / "manifest.jsonl").is_file():
            draw(options.work / "people", system.people_settings(options.model), ["heldout"])
        drawn = People.load(options.work / "people", "heldout")
        write_people(drawn, settings.most_people, settings.most_prompts, output / "people.jsonl")
        print(markdown(evaluate(settings, ExaminerRecogniser(options.model))))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
