"""The small model on a real server: the shipped graph, and whose face the demo's pictures show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from examples.small_model import system
from examples.small_model.drawing import to_pixels
from examples.small_model.evaluate import Examination
from examples.small_model.showcase import Person, read_people
from tools.demo_small import PROMPTS, person_graph
from tools.server import ComfyServer
from tools.workflow_format import api_path

GRAPH = Path(__file__).resolve().parents[2] / "workflows/graphs/feedface_small.json"


@pytest.fixture(scope="module")
def people() -> list[Person]:
    return read_people()


def test_files_are_few_and_small() -> None:
    assert sum(path.stat().st_size for path in system.FOLDER.rglob("*") if path.is_file()) <= 60e6


def test_the_graph_loads_the_first_person(people: list[Person]) -> None:
    nodes = json.loads(api_path(GRAPH).read_text("utf-8")).values()
    loaded = [node["inputs"]["image"] for node in nodes if node["class_type"] == "LoadImage"]
    assert len(set(loaded)) == 2 and set(loaded) <= {path.name for path in people[0].references}


def test_the_shipped_graph_runs_as_it_is(server: ComfyServer, people: list[Person]) -> None:
    for path in people[0].references:
        server.upload(path)
    prompt = json.loads(api_path(GRAPH).read_text("utf-8"))
    run = server.run(prompt)
    (saved,) = (key for key, node in prompt.items() if node["class_type"] == "FeedFaceSaveImage")
    plain, face = (picture.astype(int) for picture in server.pictures(run, saved))
    assert plain.shape == face.shape == (256, 256, 3) and np.abs(plain - face).mean() > 3


def test_pictures_show_the_person(server: ComfyServer, people: list[Person]) -> None:
    """The examiner, which never conditions anything, finds the pictures with the face nearer to the person."""
    examination, prompts = Examination.load(), PROMPTS[:2]
    gains = []
    for person in people:
        run = server.run(person_graph([server.upload(path) for path in person.references], prompts), timeout=600)
        plain, face = (
            examination.compare(
                to_pixels(np.stack([server.pictures(run, f"{kind}{i}")[0] for i in range(len(prompts))])), person.index
            )
            for kind in ("plain", "face")
        )
        gains += [after - before for (before, _), (after, _) in zip(plain, face, strict=True)]
    assert min(gains) > -0.1 and np.mean(gains) > 0.2, gains
