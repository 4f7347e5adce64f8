"""Training with several people in a picture: each picture token sees the references of its own region's person."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.small_training import make_config, make_models, make_photos

from feedface_core.conditioning import Face, People, combine_references, latent_masks
from feedface_core.faces.regions import region_masks
from trainer.cache import make_cache
from trainer.data.batch import collate
from trainer.data.dataset import FaceDataset, TensorShapes
from trainer.data.manifest import read_manifest
from trainer.data.manifest_index import open_manifest
from trainer.errors import TrainerError
from trainer.models.adapter import load_models
from trainer.models.feature_cache import open_cache
from trainer.training.processes import make_accelerator
from trainer.training.step import AdapterStep, encode_batch
from trainer.training.validation import Validation

SECOND = {"bbox": [60, 30, 76, 46], "identity": "person 1"}
OUTSIDE = {"bbox": [2, 30, 10, 38], "identity": "person 2"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    manifest = make_photos(root / "photos")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0] |= {"bbox": [14, 20, 40, 46], "square_bbox": None, "faces": [SECOND]}
    rows[5]["faces"] = [{**SECOND, "mask_path": "7-mask.png"}, OUTSIDE]
    several = root / "photos/several.jsonl"
    several.write_text("\n".join(map(json.dumps, rows)))
    return make_models(root / "models"), manifest, several, root


class Case:
    """A step and the samples of the first records of a manifest."""

    def __init__(self, files, manifest, samples=6, cached=False, **changes):
        models, *_, root = files
        changes = {"loss__face_dropout": 0.0, "data__flip": False, "data__cache": str(root / "cache"), **changes}
        self.config = make_config(models, manifest, root / "run", **changes)
        self.models = load_models(self.config, "cpu")
        torch.manual_seed(0)
        for branch in self.models.adapter.branches:
            torch.nn.init.normal_(branch.zero_linear.weight, std=0.2)
        self.records, _ = read_manifest(manifest)
        cache = None
        if cached:
            make_cache(self.config, progress=False)
            cache = open_cache(self.config, self.records, self.models.frozen, self.models.encoder)
        self.dataset = FaceDataset(self.records, self.config, TensorShapes.of(self.models.frozen, 64), cache)
        self.batch = collate([self.dataset[index, 0] for index in range(samples)])
        self.step = AdapterStep(self.models, self.config.loss, self.config.adapter.combination)

    def run(self):
        self.models.adapter.zero_grad()
        loss, record = self.step(self.batch)
        loss.backward()
        return loss.detach(), record, {n: v.grad.clone() for n, v in self.models.adapter.named_parameters()}


def test_a_row_with_several_faces_is_a_sample_for_each_with_the_same_people(files):
    records, _ = read_manifest(files[2])
    assert len(records) == 12 + 1 + 2
    assert [record.id for record in records[:3]] == ["0.png", "0.png/2", "1.png"]
    first, second = records[:2]
    assert (second.path, second.caption, second.mask_path) == (first.path, first.caption, first.mask_path)
    assert (second.bbox, second.identity, second.face_number) == (tuple(SECOND["bbox"]), "person 1", 1)
    assert [record.face_count for record in records[:3]] == [2, 2, 1]
    case = Case(files, files[2])
    assert [len(people) for people in case.batch.people] == [2, 2, 1, 1, 1, 1]
    assert case.batch.faces[0] == case.batch.faces[1][::-1] and case.batch.faces[2] == ()
    for sample in range(2):
        drawn, place = case.dataset.draws(sample, 0), 0
        for count, face in zip(drawn.people, drawn.faces, strict=True):
            own = drawn.references[place : place + count]
            assert {case.records[one.index].identity for one in own} == {face.identity}
            assert all(case.records[one.index].path != records[0].path for one in own)
            place += count


def test_the_index_gives_the_same_records(files, tmp_path):
    listed, _ = read_manifest(files[2])
    indexed = open_manifest(files[2], None, False, [tmp_path])
    assert list(indexed) == listed and indexed.faces_of(1) == [1, 0] and indexed.faces_of(3) == [3]


def test_rows_of_one_person_are_given_to_the_branches_as_before(files):
    """One call for all of them, with the very keys and values of the references in their order."""
    case = Case(files, files[1])
    features, counts = _features(case), case.batch.reference_counts
    assert case.batch.people == [(count,) for count in counts] and case.batch.faces == [()] * 6
    [(rows, control)] = case.step._face_rows(case.step.plan(case.batch), case.batch, features)
    tokens, bias = combine_references(features.hidden, counts, "concat")
    expected = case.models.adapter.control(case.models.adapter.project(tokens), bias)
    assert rows == 6 and control.regions is None and torch.equal(control.bias, expected.bias)
    for own, other in zip(control.kv, expected.kv, strict=True):
        assert all(torch.equal(a, b) for pair in zip(own, other, strict=True) for a, b in zip(*pair, strict=True))


def test_each_region_sees_its_own_person(files):
    """The step's prediction of a picture with two people is that of the same regions given as FeedFace Regions does."""
    case = Case(files, files[2], samples=3)
    seen, predict = [], case.models.frozen.predict

    def keep(noisy, timesteps, text, rows=None):
        found = predict(noisy, timesteps, text, rows)
        seen.append((noisy, timesteps, text, rows, found))
        return found

    case.models.frozen.predict = keep
    case.run()
    noisy, timesteps, text, rows, found = seen[-1]
    assert [count for count, _ in rows] == [1, 1, 1]
    hidden = case.models.encoder.encode(case.batch.crops).split([n for own in case.batch.people for n in own])
    masks = region_masks([face.box for face in case.batch.faces[0]], 1.5, 64, 64)
    people = People((Face(hidden[0]), Face(hidden[1])), masks)
    regions = latent_masks(masks, noisy[:1])
    control = case.models.adapter.control_of(people, "cpu", torch.float32, regions=regions)
    one, own = slice(0, 1), {name: states[:1] for name, states in text.items()}
    expected = predict(noisy[one], timesteps[one], own, [(1, control)])
    torch.testing.assert_close(found[one], expected, rtol=1e-4, atol=1e-5)
    swapped = People(people.faces[::-1], masks)
    control = case.models.adapter.control_of(swapped, "cpu", torch.float32, regions=regions)
    assert not torch.allclose(predict(noisy[one], timesteps[one], own, [(1, control)]), expected, atol=1e-3)


def test_nothing_of_a_person_reaches_outside_all_regions(files):
    case = Case(files, files[2], samples=1)
    control = case.step._face_rows(case.step.plan(case.batch), case.batch, _features(case))[0][1]
    _, weight = control.at_tokens((8, 8), torch.zeros(1))
    covered = control.regions.amax(0).flatten() > 0
    assert torch.equal(weight[0, :, 0] > 0, covered) and 0 < covered.sum() < 64


def _features(case):
    return encode_batch(case.batch, case.models.frozen, case.models.encoder)


@pytest.mark.parametrize("identity", [{}, {"weight": 1.0, "contrastive": 1.0, "below": 1.0}])
def test_all_people_teach_and_the_identity_loss_judges_each(files, identity):
    case = Case(files, files[2], samples=4, loss__identity=identity)
    _, record, gradients = case.run()
    assert all(value.isfinite().all() and value.abs().max() > 0 for value in gradients.values())
    if identity:
        assert len(record.values["identity/likeness"]) == 2 + 2 + 1 + 1
    torch.manual_seed(1)
    changed = case.batch.crops.clone()
    changed[case.batch.people[0][0]] = torch.rand_like(changed[0])  # the second person's first reference
    case.batch = dataclasses.replace(case.batch, crops=changed)
    assert not torch.equal(gradients["projection.weight"], case.run()[2]["projection.weight"])


def test_somebody_outside_the_square_is_left_out_and_masks_add_up(files):
    case = Case(files, files[2], samples=9)
    row = case.batch.ids.index("5.png")
    assert len(case.batch.people[row]) == 2  # of three
    assert [face.identity for face in case.batch.faces[row]] == ["person 1", "person 1"]
    alone = Case(files, files[1], samples=6).batch.masks[5]
    assert (case.batch.masks[row] >= alone).all() and case.batch.masks[row].sum() > alone.sum()


def test_validation_shows_the_people_of_a_row_each_in_the_own_region(files, monkeypatch):
    changes = {"validation__prompts": ["two people"], "validation__steps": 1, "validation__guidance": "joint"}
    case, controls = Case(files, files[2], samples=1, **changes), []
    validation = Validation(case.config, case.models, case.dataset, make_accelerator(case.config.train, "fp32"))
    assert [len(person.boxes or ()) for person in validation.people] == [2, 0]
    monkeypatch.setattr("trainer.training.validation.sample", lambda *a: controls.append(a[4]) or a[1])
    assert validation(0).is_file()
    assert controls[0] is None and controls[1].regions.shape == (2, 8, 8) and len(controls[1].face.faces) == 2


def test_a_cache_gives_the_same(files):
    photos, cached = Case(files, files[2]), Case(files, files[2], cached=True)
    assert cached.batch.pixels is None and cached.batch.people == photos.batch.people
    loss, _, gradients = photos.run()
    other_loss, _, other = cached.run()
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-4)
    for name, value in gradients.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("faces", "message"),
    [
        ("two", "faces: expected a list of faces with a bbox each, found 'two'"),
        ([[1, 2, 3, 4]], "faces: expected a list of faces"),
        ([{}], "faces.0: bbox: Field required"),
        ([SECOND, {"bbox": [500, 500, 600, 600]}], "faces.1: bbox: 500, 500, 600, 600 lies outside the photo"),
        ([{**SECOND, "mask_path": "none.png"}], "faces.0: mask_path: .*none.png: no such file"),
        ([SECOND] * 16, "faces: 16 further ones, at most 15"),
    ],
)
def test_faces_that_cannot_be_used_are_named(files, tmp_path, faces, message):
    row = json.loads(files[1].read_text().splitlines()[0]) | {"faces": faces}
    manifest = files[1].with_name("bad.jsonl")
    manifest.write_text(json.dumps(row))
    with pytest.raises(TrainerError, match=f"(?s)row 1, '0.png': {message}"):
        read_manifest(manifest)
