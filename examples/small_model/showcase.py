"""What the demo needs of the held-out people, so that it runs without drawing them: references and the gallery."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from . import system
from .drawing import People
from .evaluate import REFERENCES, Examination
from .loop import pixels

SHOWN = (7, 20, 31)  # held-out people of the demo: a detector finds them, and they look different from one another
GALLERY = 100  # held-out people that the demo's score is among


@dataclass(frozen=True)
class Person:
    """A held-out person of the demo.

    Args:
        index: number in the gallery.
        references: pictures of the person.
    """

    index: int
    references: tuple[Path, ...]


def write_showcase(people: People, folder: Path) -> None:
    """Writes ``people/`` with the references, and the gallery of the examiner."""
    identities = len({r["identity"] for r in people.records})
    examination = Examination(people, min(GALLERY, identities), folder)
    save_file(
        {"centre": examination.centre.half().contiguous(), "gallery": examination.gallery.half().contiguous()},
        folder / "examiner" / "gallery.safetensors",
    )
    each = len(people.records) // identities
    (folder / "people").mkdir(exist_ok=True)
    described = []
    for number, person in enumerate(SHOWN, 1):
        names = []
        for r in range(REFERENCES):
            name = f"feedface_person{number}_{r + 1}.png"
            Image.fromarray(people.pictures[person * each + r]).save(folder / "people" / name, optimize=True)
            names.append(name)
        described.append({"index": person, "references": names})
    (folder / "people" / "people.json").write_text(json.dumps(described, indent=1) + "\n")


def read_people(folder: Path = system.FOLDER) -> list[Person]:
    """The people of the demo.

    Raises:
        FileNotFoundError: the small system is not there.
    """
    path = folder / "people" / "people.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; `python -m examples.small_model.build` makes the small system")
    return [
        Person(entry["index"], tuple(folder / "people" / name for name in entry["references"]))
        for entry in json.loads(path.read_text())
    ]


class Judge:
    """The examiner with its stored gallery."""

    def __init__(self, folder: Path = system.FOLDER):
        self.examiner, _ = system.load_examiner(folder)
        stored = load_file(folder / "examiner" / "gallery.safetensors")
        self.centre, self.gallery = stored["centre"].float(), stored["gallery"].float()

    @torch.no_grad()
    def compare(self, pictures, person: int) -> list[tuple[float, int]]:
        """For each picture ``(H, W, 3)`` of bytes, 64 × 64: mean-centred cosine to the person, and how many people of
        the gallery are nearer (0: told to be this person).
        """
        x: Tensor = torch.cat([pixels(p[None]) for p in pictures])
        near = F.normalize(self.examiner(x)[0] - self.centre, dim=-1) @ self.gallery.T  # (N, people)
        own = near[:, person]
        return [(float(s), int((row > s).sum())) for s, row in zip(own, near, strict=True)]
