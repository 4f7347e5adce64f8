"""The reference of a person with one photo: changed, but deterministically, with a cache as without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.small_training import make_config, make_models, make_photos

from feedface_core.faces import FILL, resample
from trainer.cache import fill_cache
from trainer.config import DataSettings
from trainer.data import augmentation, pictures
from trainer.data.augmentation import Augmentation, augmented_crop
from trainer.data.dataset import FaceDataset, TensorShapes, make_loader
from trainer.data.manifest import Record, read_manifest
from trainer.data.order import GlobalBatches
from trainer.data.reading import read_crop
from trainer.data.references import Reference, References
from trainer.models.face_encoder import load_face_encoder
from trainer.models.feature_cache import FeatureCache, open_cache
from trainer.models.frozen_model import load_frozen_model
from trainer.training.step import encode_batch

SQUARE = (20.0, 10.0, 60.0, 50.0)
SIZE = 40


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth, so that resampling hardly changes it."""
    values = np.random.default_rng(0).integers(40, 215, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((80, 60), Image.Resampling.BICUBIC)


def crop(photo, mask=None, square=SQUARE, **changes):
    return augmented_crop(photo, square, SIZE, Augmentation(**changes), mask)


def plain(photo, square=SQUARE):
    return resample(pictures.to_tensor(photo), square, SIZE, SIZE)


# --- one crop --------------------------------------------------------------------------------------------


def test_nothing_changed_is_the_plain_crop(photo):
    torch.testing.assert_close(crop(photo), plain(photo), atol=1e-5, rtol=0)


def test_square_moves_grows_and_turns(photo):
    torch.testing.assert_close(crop(photo, shift=(0.1, -0.2)), plain(photo, (24, 2, 64, 42)), atol=1e-5, rtol=0)
    torch.testing.assert_close(crop(photo, zoom=1.2), plain(photo, (16, 6, 64, 54)), atol=1e-5, rtol=0)
    torch.testing.assert_close(crop(photo, flip=True), plain(photo).flip(1), atol=1e-5, rtol=0)
    turned = torch.rot90(plain(photo), 1)  # anticlockwise
    torch.testing.assert_close(crop(photo, angle=90.0), turned, atol=1e-3, rtol=0)
    # A small angle: the middle stays, a point to the right of it moves up.
    small = crop(photo, angle=10.0)
    torch.testing.assert_close(small[18:22, 18:22], plain(photo)[18:22, 18:22], atol=0.05, rtol=0)
    up = round(19.5 - 15 * np.sin(np.radians(10)))
    assert (small[up, 34] - plain(photo)[19, 34]).abs().max() < 0.08


def test_colours_and_blur(photo):
    before = plain(photo)
    assert crop(photo, brightness=0.7).mean() == pytest.approx(0.7 * before.mean().item(), rel=0.02)
    assert crop(photo, contrast=0.5).std() < 0.6 * before.std()
    grey = crop(photo, saturation=0.0)
    assert (grey.amax(-1) - grey.amin(-1)).max() < 1e-5
    hue = crop(photo, hue=0.03)
    assert 0.005 < (hue - before).abs().mean() < 0.2
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    assert crop(noise, blur=0.05).std() < 0.5 * plain(noise).std()


def test_background_is_removed_by_the_mask(photo):
    mask = torch.zeros(30, 40)  # at half the photo's size
    mask[8:20, 12:24] = 1.0  # 24 … 48 across and 16 … 40 down
    found = crop(photo, mask, background=False)
    torch.testing.assert_close(found[10:26, 8:24], plain(photo)[10:26, 8:24], atol=0.02, rtol=0)
    assert (found[:3] - FILL).abs().max() < 0.02 and (found[-5:] - FILL).abs().max() < 0.02
    torch.testing.assert_close(crop(photo, mask), plain(photo), atol=1e-5, rtol=0)
    torch.testing.assert_close(crop(photo, None, background=False), plain(photo), atol=1e-5, rtol=0)


def test_past_the_border_it_stays_grey(photo):
    found = crop(photo, square=(-30.0, 10.0, 10.0, 50.0), brightness=0.7, saturation=1.3, contrast=0.7)
    assert (found[:, :26] - FILL).abs().max() < 1e-5
    turned = crop(photo, square=(60.0, 40.0, 100.0, 80.0), angle=20.0, brightness=1.3)
    assert (turned[-3:, -3:] - FILL).abs().max() < 1e-5 and 0 <= turned.min() and turned.max() <= 1


@pytest.mark.parametrize("box", [(10.3, 5.1, 40.8, 35.6), (-30, -30, 20, 20), (70, 50, 100, 80), (-40, -50, 120, 110)])
@pytest.mark.parametrize("size", [7, 64])
def test_region_of_a_photo_is_cut_as_from_the_whole(photo, box, size):
    whole = resample(pictures.to_tensor(photo), box, size, size)
    torch.testing.assert_close(pictures.cut_box(photo, box, size), whole, atol=1e-5, rtol=0)
    assert pictures.cut_box(photo, (900, 900, 950, 950), 4).unique().tolist() == [FILL]


# --- what is drawn ---------------------------------------------------------------------------------------


def test_draws_differ_by_photo_and_variant_and_keep_within_their_limits():
    drawn = [Augmentation.draw(True, f"{n}.jpg", variant) for n in range(100) for variant in range(8)]
    assert len(set(drawn)) == len(drawn)
    assert drawn[9] == Augmentation.draw(True, "1.jpg", 1)
    for name, low, high in (
        ("zoom", *augmentation.ZOOM),
        ("angle", -augmentation.ANGLE, augmentation.ANGLE),
        ("brightness", *augmentation.COLOUR),
        ("hue", -augmentation.HUE, augmentation.HUE),
    ):
        values = np.array([getattr(one, name) for one in drawn])
        assert low <= values.min() and values.max() <= high, name
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.06 * (high - low)), name
    shares = {name: np.mean([bool(getattr(one, name)) for one in drawn]) for name in ("blur", "background", "flip")}
    assert shares == pytest.approx({"blur": 0.3, "background": 0.5, "flip": 0.5}, abs=0.06)
    assert not any(Augmentation.draw(False, f"{n}.jpg", 0).flip for n in range(100))
    pairs = np.array([(one.angle, one.zoom) for one in drawn])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.1


def test_only_those_without_another_photo_are_augmented():
    base = 0x0F0F0F0F0F0F0F0F
    who = [
        ("a1", "ann", base),
        ("a2", "ann", ~base & (2**64 - 1)),
        ("b1", "bob", 1),
        ("c1", "carl", base),
        ("c2", "carl", base ^ 1),
        ("d1", None, 2),
    ]
    records = [
        Record(id=name, path=Path(name), bbox=(0, 0, 9, 9), identity=person, photo_hash=photo_hash)
        for name, person, photo_hash in who
    ]

    def references_of(**changes):
        return References(records, DataSettings(manifest="m.jsonl", **changes))

    references = references_of()
    for index in range(6):
        drawn = {r for visit in range(200) for r in references.draw(index, 0, visit)}
        if index < 2:
            assert drawn == {Reference(1 - index, False), Reference(1 - index, True)}
        else:  # carl's photos are the same picture twice
            assert drawn == {Reference(index, variant=variant) for variant in range(8)}
        assert drawn <= set(references.all())
    assert len(set(references.all())) == 2 * 2 + 4 * 8
    own = references_of(retrieval=False).draw(0, 0, 0)  # without retrieval all take their own
    assert [reference.index for reference in own] == [0] and own[0].variant is not None
    for switched_off in (references_of(augment_variants=0), references_of(augment_variants=0, flip=False)):
        assert all(reference.variant is None for reference in switched_off.all())
        assert switched_off.draw(2, 0, 0)[0].index == 2 and switched_off.draw(2, 0, 0)[0].variant is None


# --- in training -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def singles(tmp_path_factory):
    """Six photos of six people."""
    return make_photos(tmp_path_factory.mktemp("photos"), count=6, people=6)


def make_dataset(manifest, **changes):
    config = make_config(manifest.parent, manifest, manifest.parent / "run", loss__face_dropout=0.0, **changes)
    return FaceDataset(read_manifest(manifest)[0], config, TensorShapes((4, 8, 8)))


def test_reference_of_a_person_with_one_photo_is_not_the_crop_of_the_target(singles):
    dataset = make_dataset(singles)
    record, size = dataset.records[0], dataset.crop_size
    before = read_crop(record, size)
    crops = [dataset[0, visit]["crops"] for visit in range(12)]
    assert all(len(own) == 1 and own[0].shape == before.shape for own in crops)
    for own in crops:
        distances = [(own[0] - same).abs().mean().item() for same in (before, before.flip(1))]
        assert min(distances) > 0.01
    assert 2 <= len({own[0].numpy().tobytes() for own in crops}) <= 8
    unchanged = make_dataset(singles, data__augment_variants=0, data__flip=False)
    assert all(torch.equal(unchanged[0, visit]["crops"][0], before) for visit in range(4))


def test_photo_is_unpacked_once_for_target_and_reference(singles, monkeypatch):
    opened = []
    read = pictures.open_photo
    monkeypatch.setattr(pictures, "open_photo", lambda path: opened.append(path) or read(path))
    _ = make_dataset(singles)[0, 0]
    assert opened == [singles.parent / "0.png"]


def test_augmented_samples_depend_on_seed_id_and_visit_alone(singles):
    dataset, state = make_dataset(singles), torch.get_rng_state()
    first = [dataset[index, visit]["crops"][0] for index in range(6) for visit in range(3)]
    torch.manual_seed(5)
    np.random.seed(5)
    again = [dataset[index, visit]["crops"][0] for index in reversed(range(6)) for visit in reversed(range(3))]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    torch.manual_seed(5)
    assert not torch.equal(torch.get_rng_state(), state)
    before = torch.get_rng_state()
    _ = dataset[0, 0]
    assert torch.equal(torch.get_rng_state(), before)
    other = make_dataset(singles, train__seed=4)
    drawn = [[d.draws(0, visit).references[0].variant for visit in range(30)] for d in (dataset, other)]
    assert drawn[0] != drawn[1]
    # Another seed draws other variants, but of the same ones: what is cached serves every run.
    assert dataset.references.augmentation(Reference(0, variant=3)) == other.references.augmentation(
        Reference(0, variant=3)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_cache_holds_the_variants(singles, tmp_path):
    models = make_models(tmp_path / "models")
    config = make_config(
        models,
        singles,
        tmp_path / "run",
        data__cache=str(tmp_path / "cache"),
        data__augment_variants=3,
        loss__face_dropout=0.0,
    )
    base, encoder = load_frozen_model(config.model), load_face_encoder(config.adapter.encoder)
    records = read_manifest(singles)[0]

    def computed(config):
        cache = FeatureCache(config, records, base, encoder)
        return fill_cache(cache, config, base, encoder, progress=False).computed["face"]

    assert computed(config) == 6 * 3  # and no plain crop: nobody is anybody's reference
    assert computed(config) == 0
    shapes = TensorShapes.of(base, 64)
    plain_set = FaceDataset(records, config, shapes)
    cached = FaceDataset(records, config, shapes, open_cache(config, records, base, encoder))
    sets = ((plain_set, 0), (plain_set, 2), (cached, 2))
    runs = [make_loader(dataset, GlobalBatches(6, 3, 1, steps=6), workers) for dataset, workers in sets]
    for first, second, third in zip(*runs, strict=True):
        assert first.ids == third.ids and torch.equal(first.crops, second.crops)
        expected, found = (encode_batch(batch, base, encoder) for batch in (first, third))
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
    more = config.model_copy(update={"data": config.data.model_copy(update={"augment_variants": 4})})
    assert computed(more) == 6
    mask = replace(records[0], mask_path=records[1].mask_path)
    removed = [Augmentation.draw(True, records[0].id, variant).background for variant in range(3)].count(False)
    assert 0 < removed < 3  # only those whose background goes depend on the mask
    changed = FeatureCache(config, [mask, *records[1:]], base, encoder)
    assert len(changed["face"].missing()) == removed


def test_references_can_be_mirrored_without_the_photos(singles):
    pairs = make_photos(singles.parent / "pairs", count=6, people=2)
    dataset = make_dataset(pairs, data__flip=False, data__flip_references=True)
    draws = [dataset.draws(index, visit) for index in range(6) for visit in range(50)]
    assert not any(draw.flip for draw in draws)
    flips = [reference.flip for draw in draws for reference in draw.references]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.06)
    kept = make_dataset(pairs, data__flip=True, data__flip_references=False)
    draws = [kept.draws(index, visit) for index in range(6) for visit in range(20)]
    assert any(draw.flip for draw in draws) and not any(r.flip for draw in draws for r in draw.references)
