"""What the demo needs of the held-out people, so that it runs without drawing them: references and the gallery."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from feedface_core.guidance import Guidance
from trainer.errors import TrainerError

from . import system
from .drawing import People
from .evaluate import REFERENCES, Examination, SmallModel, requests

SHOWN = (7, 20, 31)  # held-out people of the demo: a detector finds them, and they look different from one another
PLAIN = Guidance(-2.0, 3.0, 0.0, 0.0)  # text alone at cfg 3
GALLERY = 100  # held-out people that the demo's score is among


class Person(NamedTuple):
    """A held-out person of the demo: the number in the gallery, and pictures."""

    index: int
    references: list[Path]


def write_showcase(people: People, folder: Path) -> None:
    """Writes ``people/`` with the references, and the gallery of the examiner."""
    identities = len(set(people.identities()))
    Examination.of(people, min(GALLERY, identities), folder).save_gallery(folder)
    (folder / "people").mkdir(exist_ok=True)
    described, pictures = [], people.pictures_of(identities)
    for number, person in enumerate(SHOWN, 1):
        names = [f"feedface_person{number}_{r + 1}.png" for r in range(REFERENCES)]
        for name, index in zip(names, pictures[person], strict=False):
            shutil.copyfile(people.folder / people.records[index]["path"], folder / "people" / name)
        described.append({"index": person, "references": names})
    (folder / "people" / "people.json").write_text(json.dumps(described, indent=1) + "\n")


def write_sheet(folder: Path, path: Path, count: int = 48, columns: int = 8) -> None:
    """Writes the first pictures of the benchmark's prompts without a face, side by side; none is chosen."""
    pictures = SmallModel(folder).draw(None, requests(count, 1), PLAIN)
    rows = (pictures / 2 + 0.5).clamp(0, 1).mul(255).round().byte().movedim(1, -1).unflatten(0, (-1, columns))
    Image.fromarray(rows.movedim(1, 2).flatten(2, 3).flatten(0, 1).numpy()).save(path)


def read_people(folder: Path = system.FOLDER) -> list[Person]:
    """The people of the demo. Raises ``TrainerError`` where the small model is not there."""
    path = folder / "people" / "people.json"
    if not path.is_file():
        raise TrainerError(f"no {path}: `python -m examples.small_model.build` makes the small model")
    described = json.loads(path.read_text())
    return [Person(one["index"], [path.with_name(name) for name in one["references"]]) for one in described]
