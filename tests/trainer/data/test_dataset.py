"""Order, draws, references, pictures: all from (seed, sample id, visit)."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.small_training import make_config, make_photos

from trainer.config import DataSettings
from trainer.data.batch import Batch
from trainer.data.dataset import FaceDataset, TensorShapes, make_loader, pictures, randomness, read_crop
from trainer.data.manifest import Record, read_manifest
from trainer.data.order import GlobalBatches
from trainer.data.references import Reference, References

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


# --- randomness ------------------------------------------------------------------------------------------


def test_seeds_tell_all_parts_apart_and_never_change():
    # A change of these numbers would make every run unrepeatable.
    assert randomness.seed_of(0, "order", 0) == 1483281915508598133
    assert randomness.normal((3,), 7, "noise", "a.jpg", 2).tolist() == pytest.approx(
        [1.4489006996154785, 0.30063486099243164, 0.8782075643539429]
    )
    parts = [(1, "a"), (1, "a", 0), ("1", "a"), ("a", 1), (1, "b"), ("ab", "c"), ("a", "bc"), (-1, "a")]
    assert len({randomness.seed_of(*part) for part in parts}) == len(parts)
    with pytest.raises(TypeError, match="1.5"):
        randomness.seed_of(1.5)


def test_draws_are_uniform():
    values = np.array([randomness.uniform(3, "test", f"id{n}", 1) for n in range(20_000)])
    assert abs(values.mean() - 0.5) < 0.01 and abs(values.std() - 12**-0.5) < 0.01
    counts = Counter(randomness.integer(5, "x", n) for n in range(5000))
    assert sorted(counts) == [0, 1, 2, 3, 4] and min(counts.values()) > 850
    assert not any(randomness.chance(0.0, n) for n in range(100))
    assert all(randomness.chance(1.0, n) for n in range(100))


# --- order -----------------------------------------------------------------------------------------------


def test_every_epoch_is_another_permutation_and_batches_go_across():
    order = GlobalBatches(10, 4, seed=1, steps=5, repeat=1)
    entries = [entry for batch in order for entry in batch]
    assert sorted(entries) == [(index, visit) for index in range(10) for visit in (0, 1)]
    first, second = [index for index, _ in entries[:10]], [index for index, _ in entries[10:]]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [index for index, _ in GlobalBatches(10, 10, seed=2, steps=1).global_batch(0)] != first


def test_repeat_counts_as_further_visits():
    entries = GlobalBatches(3, 12, seed=0, steps=1, repeat=2).global_batch(0)
    assert sorted(entries) == [(index, visit) for index in range(3) for visit in range(4)]
    assert {visit for _, visit in entries[:6]} == {0, 1}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_share_the_same_global_batches(accumulation):
    settings = {"count": 7, "batch_size": 8, "seed": 5, "steps": 6, "accumulation": accumulation}
    one = list(GlobalBatches(**settings))
    two = [list(GlobalBatches(**settings, process=rank, processes=2)) for rank in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1]) == 6 * accumulation
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_resuming_is_starting_at_the_step():
    whole = list(GlobalBatches(11, 4, seed=9, steps=8, accumulation=2))
    rest = GlobalBatches(11, 4, seed=9, steps=8, accumulation=2, start=3)
    assert list(rest) == whole[6:] and len(rest) == 10


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"batch_size is 6, which does not divide by 2 process\(es\) × 2"):
        GlobalBatches(5, 6, 0, 1, processes=2, accumulation=2)
    with pytest.raises(ValueError, match="no samples"):
        GlobalBatches(0, 6, 0, 1)


# --- determinism of whole samples ------------------------------------------------------------------------


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


# --- references ------------------------------------------------------------------------------------------


def make_record(name, identity, photo_hash=None, crop_hash=None):
    return Record(
        id=name, path=Path(name), bbox=(0, 0, 9, 9), identity=identity, photo_hash=photo_hash, crop_hash=crop_hash
    )


def references_of(records, **changes):
    return References(records, DataSettings(manifest="", augment_variants=0, flip=False, **changes))


def test_references_are_other_photos_of_the_person():
    records = [make_record(f"{n}.jpg", "ann" if n < 8 else "bob" if n == 8 else None) for n in range(11)]
    references = references_of(records)
    counts = Counter()
    for visit in range(500):
        drawn = [reference.index for reference in references.draw(3, 0, visit)]
        assert 3 not in drawn and len(set(drawn)) == len(drawn) and set(drawn) <= set(range(8))
        counts[len(drawn)] += 1
    assert sorted(counts) == [1, 2, 3, 4, 5] and min(counts.values()) > 70
    assert references.draw(8, 0, 0) == (Reference(8),)  # the only photo of bob
    assert references.draw(9, 0, 0) == (Reference(9),)  # nobody knows who that is
    off = references_of(records, retrieval=False)
    assert off.draw(3, 0, 0) == (Reference(3),)


def test_near_duplicates_are_no_references():
    base = 0x0F0F0F0F0F0F0F0F
    records = [
        make_record("a", "ann", base, base),
        make_record("b", "ann", base ^ 0b11, ~base & (2**64 - 1)),  # the photo again, recompressed
        make_record("c", "ann", ~base & (2**64 - 1), base ^ 0b1111),  # the photo again, cut differently
        make_record("d", "ann", base ^ 0b11111, base ^ 0xFF),  # five and eight bits apart: another photo
        make_record("a", "ann"),  # the photo again, with another caption
    ]
    assert [*references_of(records).candidates(0)] == [3]
    assert [*references_of(records, duplicate_distance=0).candidates(0)] == [1, 2, 3]


def test_perceptual_hash_survives_recompression_only(tmp_path):
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.astronaut())
    photo.resize((300, 300)).save(tmp_path / "small.jpg", quality=60)
    again = pictures.open_photo(tmp_path / "small.jpg")
    first = pictures.perceptual_hash(photo)
    assert pictures.hash_distance(first, pictures.perceptual_hash(again)) <= 2
    other = Image.fromarray(data.coffee())
    assert pictures.hash_distance(first, pictures.perceptual_hash(other)) > 15
    assert (
        pictures.hash_distance(first, pictures.perceptual_hash(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 15
    )


# --- pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "face", "expected"),
    [
        ((100, 60), None, (20, 0, 60)),
        ((100, 60), (30, 10, 50, 30), (20, 0, 60)),  # inside already
        ((100, 60), (2, 10, 20, 30), (2, 0, 60)),
        ((100, 60), (80, 10, 99.5, 30), (40, 0, 60)),
        ((100, 60), (-8, 10, 20, 30), (0, 0, 60)),  # past the border
        ((60, 100), (10, 5, 50, 45), (0, 5, 60)),
        ((60, 200), (10, 90, 50, 190), (0, 110, 60)),  # longer than the square: centred
        ((64, 64), (0, 0, 64, 64), (0, 0, 64)),
    ],
)
def test_training_square_moves_as_little_as_it_takes(size, face, expected):
    assert pictures.training_square(*size, face) == expected


def test_mask_is_cut_like_the_photo(tmp_path):
    photo = Image.new("RGB", (100, 60), "black")
    photo.paste("white", (40, 20, 60, 40))
    mask = Image.new("L", (50, 30), 0)  # half the photo's size
    mask.paste(23, (20, 10, 30, 20))  # the lowest class of the released masks
    mask.save(tmp_path / "mask.png")
    square = pictures.training_square(100, 60, None)
    pixels = pictures.cut_pixels(photo, square, 60)
    cut = pictures.cut_mask(pictures.read_mask(tmp_path / "mask.png", (100, 60)), (100, 60), square, 6)
    expected = torch.zeros(6, 6)
    expected[2:4, 2:4] = 1.0
    assert torch.equal(cut[0], expected)
    assert torch.equal((pixels[0] > 0).float(), expected.repeat_interleave(10, 0).repeat_interleave(10, 1))
    coarse = pictures.cut_mask(pictures.read_mask(tmp_path / "mask.png", (100, 60)), (100, 60), square, 4)
    assert coarse[0, 1, 1].item() == pytest.approx((10 / 15) ** 2, abs=1e-5)  # the share of the cell it covers


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


def test_photos_are_upright_and_in_colour(tmp_path):
    photo = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    photo.save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.open_photo(tmp_path / "turned.jpg").size == (4, 8)
    Image.new("L", (4, 4), 100).save(tmp_path / "grey.png")
    assert pictures.open_photo(tmp_path / "grey.png").getpixel((0, 0)) == (100, 100, 100)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pictures.open_photo(tmp_path / "clear.png").getpixel((0, 0)) == (128, 128, 128)
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert pictures.open_photo(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def test_crop_made_in_advance_equals_the_one_cut_anew(tmp_path, manifest):
    record = read_manifest(manifest)[0][0]
    crop = read_crop(record, 64)
    assert crop.shape == (64, 64, 3)
    pictures.to_picture(crop).save(tmp_path / "crop.png")
    again = read_crop(replace(record, crop_path=tmp_path / "crop.png"), 64)
    assert (again - crop).abs().max() <= 0.5 / 255 + 1e-6
    other = read_crop(replace(record, crop_path=tmp_path / "crop.png"), 32)  # of another size: cut from the photo
    assert torch.equal(other, read_crop(record, 32))
