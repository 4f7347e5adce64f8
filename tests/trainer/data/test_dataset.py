"""Samples and batches: all from (seed, sample id, visit)."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from support.small_training import make_config, make_photos

from trainer.data.batch import Batch
from trainer.data.dataset import FaceDataset, TensorShapes, make_loader, pictures
from trainer.data.manifest import read_manifest
from trainer.data.order import GlobalBatches
from trainer.data.reading import read_crop

SHAPES = TensorShapes((4, 8, 8))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def make_dataset(manifest, shapes=SHAPES, records=None, **changes):
    config = make_config(manifest.parent, manifest, manifest.parent / "run", **changes)
    return FaceDataset(records or read_manifest(manifest)[0], config, shapes)


def assert_same(first: Batch, second: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_the_same_at_any_number_of_workers(manifest):
    dataset = make_dataset(manifest)
    runs = {
        workers: list(make_loader(dataset, GlobalBatches(len(dataset), 4, 3, steps=6), workers))
        for workers in (0, 2, 4)
    }
    for workers in (2, 4):
        for first, second in zip(runs[0], runs[workers], strict=True):
            assert_same(first, second)
    assert runs[0][0].pixels.shape == (4, 3, 64, 64) and runs[0][0].masks.shape == (4, 1, 8, 8)
    assert runs[0][0].noise.shape == (4, 4, 8, 8) and runs[0][0].timesteps.dtype == torch.int64


def test_global_random_state_is_left_alone(manifest):
    dataset = make_dataset(manifest)
    before = torch.get_rng_state()
    next(iter(make_loader(dataset, GlobalBatches(len(dataset), 4, 3, steps=1))))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_processes_see_together_what_one_sees(manifest):
    dataset = make_dataset(manifest)
    one = list(make_loader(dataset, GlobalBatches(len(dataset), 4, 3, steps=3)))
    shares = [make_loader(dataset, GlobalBatches(len(dataset), 4, 3, 3, process=p, processes=2)) for p in (0, 1)]
    for whole, left, right in zip(one, *shares, strict=True):
        assert whole.ids == left.ids + right.ids
        assert torch.equal(whole.pixels, torch.cat([left.pixels, right.pixels]))
        assert torch.equal(whole.noise, torch.cat([left.noise, right.noise]))
        assert torch.equal(whole.timesteps, torch.cat([left.timesteps, right.timesteps]))
        assert whole.reference_counts == left.reference_counts + right.reference_counts


def test_going_on_at_a_step_gives_the_same_batches(manifest):
    dataset = make_dataset(manifest)
    whole = list(make_loader(dataset, GlobalBatches(len(dataset), 4, 3, steps=7)))
    rest = list(make_loader(make_dataset(manifest), GlobalBatches(len(dataset), 4, 3, steps=7, start=4)))
    for first, second in zip(whole[4:], rest, strict=True):
        assert_same(first, second)


def test_draws_do_not_depend_on_the_place_in_the_manifest(manifest):
    records = read_manifest(manifest)[0]
    backwards = records[::-1]
    first, second = make_dataset(manifest, records=records), make_dataset(manifest, records=backwards)
    for index, record in enumerate(records):
        a, b = first.draws(index, 5), second.draws(len(records) - 1 - index, 5)
        own, other = (
            [(kept[r.index].id, r.flip, r.variant) for r in draws.references]
            for kept, draws in ((records, a), (backwards, b))
        )
        assert own == other, record.id
        assert (a.timestep, a.flip, a.drop_face) == (b.timestep, b.flip, b.drop_face)


def test_shares_of_drops_are_as_set_and_independent(manifest):
    changes = {"loss__face_dropout": 0.1, "loss__text_dropout": 0.2, "loss__standard_probability": 0.3}
    dataset = make_dataset(manifest, **changes)
    draws = [dataset.draws(index, visit) for index in range(12) for visit in range(400)]
    shares = {name: np.array([getattr(d, name) for d in draws]) for name in ("drop_face", "drop_text", "standard_loss")}
    for name, expected in (("drop_face", 0.1), ("drop_text", 0.2), ("standard_loss", 0.3)):
        assert abs(shares[name].mean() - expected) < 0.02, name
    assert abs((shares["drop_face"] & shares["drop_text"]).mean() - 0.02) < 0.01
    assert abs(np.mean([d.flip for d in draws]) - 0.5) < 0.03
    times = np.array([d.timestep for d in draws])
    assert times.min() < 5 and times.max() > 994 and abs(times.mean() - 499.5) < 13
    for draw in draws:
        assert bool(draw.references) != draw.drop_face


def test_dropped_conditions_reach_the_batch(manifest):
    dropped = make_dataset(manifest, loss__face_dropout=1.0, loss__text_dropout=1.0)
    batch = next(iter(make_loader(dropped, GlobalBatches(12, 4, 0, 1))))
    assert batch.crops is None and batch.reference_counts == [0] * 4 and batch.captions == [""] * 4
    kept = make_dataset(manifest, loss__face_dropout=0.0, loss__text_dropout=0.0)
    batch = next(iter(make_loader(kept, GlobalBatches(12, 4, 0, 1))))
    assert batch.crops.shape == (sum(batch.reference_counts), 64, 64, 3)
    assert all(caption.startswith("a photo of person") for caption in batch.captions)


def test_flip_mirrors_photo_and_mask_together(manifest):
    dataset = make_dataset(manifest)
    index, entries = 0, {}
    for visit in range(40):
        entries.setdefault(dataset.draws(index, visit).flip, (index, visit))
    plain, mirrored = dataset[entries[False]], dataset[entries[True]]
    assert torch.equal(plain["pixels"].flip(-1), mirrored["pixels"])
    assert torch.equal(plain["mask"].flip(-1), mirrored["mask"])
    assert not torch.equal(plain["mask"], mirrored["mask"])
    assert not any(make_dataset(manifest, data__flip=False).draws(index, visit).flip for visit in range(40))


def test_crop_made_in_advance_equals_the_one_cut_anew(tmp_path, manifest):
    record = read_manifest(manifest)[0][0]
    crop = read_crop(record, 64)
    assert crop.shape == (64, 64, 3)
    pictures.to_picture(crop).save(tmp_path / "crop.png")
    again = read_crop(replace(record, crop_path=tmp_path / "crop.png"), 64)
    assert (again - crop).abs().max() <= 0.5 / 255 + 1e-6
    other = read_crop(replace(record, crop_path=tmp_path / "crop.png"), 32)  # of another size: cut from the photo
    assert torch.equal(other, read_crop(record, 32))
