"""What long runs want: people held out and their loss, a folder that says what it is, a budget of broken photos."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.small_training import make_config, make_models, make_photos, weights

from trainer import train
from trainer.config import Config, DataSettings
from trainer.data.held_out import is_held_out, split
from trainer.data.manifest import Record, read_manifest
from trainer.data.order import GlobalBatches
from trainer.data.unreadable import PhotoBudget
from trainer.errors import TrainerError

pytestmark = pytest.mark.usefixtures("alone")
SHARE = 0.3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("long")
    return make_models(root / "models"), make_photos(root / "photos", count=24, people=8)


def people(count: int) -> list[Record]:
    return [Record(id=f"{n}", path=f"{n}.png", bbox=(0, 0, 9, 9), identity=f"person {n // 2}") for n in range(count)]


def test_split_is_by_person_and_by_name_alone():
    records = people(2000)
    trained, held = split(records, SHARE)
    assert len(held) / 2000 == pytest.approx(SHARE, abs=0.05) and sorted([*trained, *held]) == list(range(2000))
    assert not {records[index].identity for index in trained} & {records[index].identity for index in held}
    names = {records[index].id for index in held}
    again = list(reversed(records + [replace(records[0], id="new", identity="somebody new")]))
    assert {again[index].id for index in split(again, SHARE)[1]} - {"new"} == names
    assert names <= {records[index].id for index in split(records, 0.5)[1]}  # a larger share adds people
    assert is_held_out(replace(records[0], identity=None), 0.999)
    with pytest.raises(TrainerError, match="data.held_out=0.01 of the people leaves 2 photos to train on and 0 held"):
        split(people(2), 0.01)


def test_order_keeps_to_the_samples_it_is_given():
    samples = np.array([3, 5, 8])
    plain, chosen = GlobalBatches(3, 3, seed=1, steps=4), GlobalBatches(3, 3, seed=1, steps=4, samples=samples)
    for step in range(4):
        expected = [(int(samples[index]), visit) for index, visit in plain.global_batch(step)]
        assert chosen.global_batch(step) == expected


def test_loss_of_held_out_people(files, tmp_path):
    changes = {
        "data__held_out": SHARE,
        "validation__loss_every": 3,
        "validation__loss_samples": 5,
        "train__log_every": 2,
    }
    config = make_config(*files, tmp_path / "run", **changes)
    train.train(config)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["held-out loss"] for line in lines if "held-out loss" in line}
    assert found.keys() == {3, 6} and found[3] != found[6]
    assert any(name.startswith("held-out loss by timestep/") for name in lines[-1])
    # Nobody who is held out is trained on: without those rows the weights are the same.
    records, _ = read_manifest(files[1])
    held = {records[index].path.name for index in split(records, SHARE)[1]}
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert held and 0 < len(held) < len(rows)
    kept = files[1].with_name("kept.jsonl")
    kept.write_text("\n".join(json.dumps(row) for row in rows if row["path"] not in held))
    train.train(make_config(files[0], kept, tmp_path / "without", **changes | {"data__held_out": 0.0}))
    one, other = weights(tmp_path / "run", 6), weights(tmp_path / "without", 6)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    # A resumed run measures the same.
    parts = make_config(*files, tmp_path / "parts", **changes, train__steps=3)
    train.train(parts)
    train.train(make_config(*files, tmp_path / "parts", **changes))
    again = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert {line["step"]: line["held-out loss"] for line in again if "held-out loss" in line} == found


def test_weights_of_data_sets(files, tmp_path):
    models, manifest = files
    rows, paths = manifest.read_text().splitlines(), []
    for name, own in (("few", rows[:4]), ("many", rows[4:])):
        paths.append(manifest.with_name(f"{name}.jsonl"))
        paths[-1].write_text("\n".join(own))

    def run(name: str, steps: int = 4, **changes) -> dict:
        config = make_config(models, manifest, tmp_path / name, train__steps=steps, **changes)
        data = config.data.model_copy(update={"manifest": [str(path) for path in paths]})
        train.train(config.model_copy(update={"data": data}))
        return weights(tmp_path / name, steps)

    whole = run("whole", data__weights=[3.0, 1.0])
    run("parts", 2, data__weights=[3.0, 1.0])
    resumed = run("parts", data__weights=[3.0, 1.0])
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert any(not torch.equal(value, whole[name]) for name, value in run("even").items())
    with pytest.raises(TrainerError, match=r"data.weights has 1 numbers for 2 manifest"):
        run("wrong", data__weights=[1.0])


def test_folder_says_what_it_is(files, tmp_path):
    output = tmp_path / "a run"
    for steps in (2, 4):
        train.train(make_config(*files, output, train__steps=steps, adapter__title="of mine"))
    text = (output / "README.txt").read_text()
    assert "of mine" in text and f"trainer.export '{output}'" in text and "24 photos" in text
    assert Config.load(output / "config.yaml") == make_config(*files, output, train__steps=4, adapter__title="of mine")
    first, second = [json.loads(line) for line in (output / "starts.jsonl").read_text().splitlines()]
    assert (first["step"], second["step"]) == (0, 2)
    assert first["versions"]["torch"] == torch.__version__ and "python" in first["command"]


def test_budget_of_unreadable_photos_as_a_share():
    def allowed(photos: int, **values) -> int:
        values = {"manifest": "a", **values}
        return PhotoBudget.of(DataSettings(**values), photos).allowed

    assert allowed(10_000) == 10
    assert allowed(10_000, unreadable_share=0.01) == 100
    assert allowed(100, unreadable_share=0.01) == 10
    assert allowed(100, unreadable_share=0.01, unreadable_photos=0) == 1
