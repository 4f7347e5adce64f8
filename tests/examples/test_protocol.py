"""The published evaluation on the small model: its examiner as a recogniser, and the people's manifest."""

from __future__ import annotations

import numpy as np
import torch

from examples.small_model.drawing import People
from examples.small_model.people import ATTRIBUTES
from examples.small_model.protocol import ExaminerRecogniser, write_people
from examples.small_model.showcase import read_people
from feedface_core.faces import WholeImage, load_image
from trainer.config import EvaluateSettings
from trainer.evaluate.people import read_people as read_evaluated


def test_examiner_tells_the_shipped_people_apart():
    examiner, vectors = ExaminerRecogniser(), []
    for person in read_people():
        images = [load_image(path) for path in person.references]
        vectors.append(torch.stack([examiner.vector(image, WholeImage().detect(image)[0]) for image in images]))
    own = [examiner.similarity(some, some)[~torch.eye(len(some), dtype=bool)].min() for some in vectors]
    others = [examiner.similarity(one, other).max() for one in vectors for other in vectors if one is not other]
    assert min(own) > max(others)


def test_people_get_prompts_of_other_scenes(tmp_path):
    """Ten drawings each, the prompts not those that the drawings show."""
    records, scene = [], {name: values[0] for name, values in ATTRIBUTES.items()}
    for index in range(30):
        person = f"heldout-{index // 10:05d}"
        records.append(
            {"id": f"{person}-{index % 10}", "path": f"{index}.png", "identity": person, "box": [9, 9, 50, 50]}
        )
        records[-1] |= {"caption": "as drawn", **scene}
        (tmp_path / f"{index}.png").write_bytes(read_people()[0].references[0].read_bytes())
    write_people(People(tmp_path, records), 2, 8, tmp_path / "people.jsonl")
    given = {"people": str(tmp_path / "people.jsonl"), "output": "out", "pictures": "elsewhere"}
    people = read_evaluated(EvaluateSettings.load(None, [], **given))
    assert [len(one.photos) for one in people] == [10, 10] and people[0].photos[0].box == (9, 9, 50, 50)
    prompts = [[request.prompt for request in one.requests] for one in people]
    assert (
        [len(np.unique(own)) for own in prompts] == [8, 8] and "as drawn" not in prompts[0] and prompts[0] != prompts[1]
    )
