"""Photos of several shapes: the size each is trained at, batches of one size, and where faces and masks come to lie."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from support.small_training import largest_difference, make_config, make_models, settings, weights

from feedface_core.faces.background import largest_rectangle, largest_square
from trainer import train
from trainer.cache import make_cache
from trainer.config import Config
from trainer.data.buckets import BucketedBatches, Buckets, TensorShapes, parts_by_bucket
from trainer.data.dataset import FaceDataset
from trainer.data.manifest import read_manifest
from trainer.data.manifest_index import open_manifest
from trainer.errors import TrainerError
from trainer.training import step

ON = {"data__bucket_step": 16, "data__flip": False}
PHOTOS = [(96, 80), (60, 120), (120, 60), (90, 90), (64, 118), (100, 50), (61, 122), (80, 96), (70, 68)] * 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models, and a manifest of photos with a red face, whose mask is the face, each in a corner or the middle."""
    root = tmp_path_factory.mktemp("buckets")
    rows = []
    for index, (width, height) in enumerate(PHOTOS):
        left, top = (width - 24) * (index % 3) // 2, (height - 24) * (index % 2)
        box = (left, top, left + 23, top + 23)
        photo, mask = Image.new("RGB", (width, height), (0, 0, 40 + index)), Image.new("L", (width, height), 0)
        ImageDraw.Draw(photo).rectangle(box, fill=(255, 0, 0))
        ImageDraw.Draw(mask).rectangle(box, fill=231)
        photo.save(root / f"{index}.png")
        mask.save(root / f"{index}-mask.png")
        row = {"path": f"{index}.png", "caption": f"photo {index}", "mask_path": f"{index}-mask.png"}
        row |= {"bbox": [left, top, left + 24, top + 24], "identity": f"person {index % 6}"}
        rows.append(row | ({"width": width, "height": height} if index % 5 else {}))
    (root / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return make_models(root / "models"), root / "manifest.jsonl"


def make_dataset(files, tmp_path, **changes):
    config = make_config(*files, tmp_path / "run", **ON, **changes)
    shapes = {(w, h): (4, h // 8, w // 8) for w, h in Buckets.of(config.data).sizes}
    return FaceDataset(read_manifest(files[1])[0], config, TensorShapes((4, 8, 8), others=shapes))


@pytest.mark.parametrize(("side", "step", "ratio"), [(64, 16, 2.0), (512, 64, 2.0), (1024, 64, 4.0), (768, 128, 1.0)])
def test_sizes(side, step, ratio):
    config = Config.load(
        **settings(
            Path("m"), Path("f"), Path("o"), data__resolution=side, data__bucket_step=step, data__bucket_ratio=ratio
        )
    )
    buckets = Buckets.of(config.data)
    assert buckets.sizes[buckets.square] == (side, side) and len(set(buckets.sizes)) == len(buckets.sizes)
    for width, height in buckets.sizes:
        assert width % step == height % step == 0 and width * height <= side * side
        assert max(width, height) <= ratio * min(width, height) and (height, width) in buckets.sizes
        assert (width + step) * height > side * side or (height + step) * width > side * side, "could be larger"
    widths, heights = np.random.default_rng(0).integers(1, 4000, (2, 500))
    for width, height, found in zip(widths, heights, buckets.assign(widths, heights), strict=True):
        off = [abs(np.log(width / height) - np.log(w / h)) for w, h in buckets.sizes]
        assert off[found] == min(off)
    assert buckets.assign(np.zeros(1, int), np.zeros(1, int))[0] == buckets.square


def test_without_buckets_there_is_the_square_alone(files, tmp_path):
    config = make_config(*files, tmp_path)
    assert Buckets.of(config.data) == Buckets(((64, 64),))
    rng = np.random.default_rng(1)
    for width, height, x, y in rng.integers(1, 300, (200, 4)):
        face = (x - 50.0, y - 50.0, x + 30.0, y + 70.0)
        assert largest_rectangle(width, height, (64, 64), face)[:3] == largest_square(width, height, face)


def test_a_frame_has_the_shape_and_holds_the_face():
    rng = np.random.default_rng(2)
    for width, height, across, down in rng.integers(40, 400, (300, 4)).tolist():
        left, top, own_width, own_height = frame = largest_rectangle(width, height, (across, down), None)
        assert left >= 0 and top >= 0 and left + own_width <= width and top + own_height <= height
        assert own_width == width or own_height == height, "the largest"
        assert abs(own_width * down - own_height * across) <= max(across, down)
        side = min(own_width, own_height)
        x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
        moved = largest_rectangle(width, height, (across, down), (x, y, x + side, y + side))
        assert moved[2:] == frame[2:] and moved[0] <= x and moved[1] <= y
        assert x + side <= moved[0] + moved[2] and y + side <= moved[1] + moved[3]


COUNTS = [(1, 2, 30), (17, 5, 9), (4,), (100, 3, 3, 50)]


def batches(counts, steps=60, **changes):
    ends = np.cumsum(counts)
    parts = tuple(np.arange(end - count, end) for count, end in zip(counts, ends, strict=True))
    values = {"count": sum(counts), "batch_size": 8, "seed": 3, "steps": steps, **changes}
    return BucketedBatches(**values, parts=parts), parts


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("repeat", [1, 3])
def test_one_bucket_a_batch_and_every_sample_once_an_epoch(counts, repeat):
    order, parts = batches(counts, repeat=repeat)
    seen = []
    for batch in order:
        assert len(batch) == 8
        assert sum(bool({index for index, _ in batch} & set(part.tolist())) for part in parts) == 1
        seen += batch
    assert len(set(seen)) == len(seen), "no visit of a sample comes twice"
    for number, part in enumerate(parts):
        own = [entry for entry in seen if entry[0] in part]
        length = len(part) * repeat
        for epoch in range(len(own) // length):
            wanted = [(index, visit) for index in part for visit in range(epoch * repeat, (epoch + 1) * repeat)]
            assert sorted(own[epoch * length : (epoch + 1) * length]) == wanted
        # As often as its share says, to a batch.
        assert abs(len(own) - len(seen) * len(part) / sum(counts)) <= 8 * len(counts) + length, number


@pytest.mark.parametrize("counts", COUNTS)
def test_the_same_at_any_number_of_processes_and_after_a_stop(counts):
    whole = list(batches(counts, accumulation=2)[0])
    shares = [list(batches(counts, accumulation=2, process=rank, processes=2)[0]) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    for start in (1, 17, 59):
        assert list(batches(counts, accumulation=2, start=start)[0]) == whole[2 * start :]
    assert list(batches(counts, seed=4)[0]) != list(batches(counts)[0])
    kinds = [batch[0][0] >= counts[0] for batch in batches(counts)[0]]
    assert len(counts) == 1 or kinds != sorted(kinds), "in an order of their own"


def test_pictures_masks_and_faces_come_to_lie_together(files, tmp_path):
    for crop in ("face", "centre"):
        dataset = make_dataset(files, tmp_path, data__crop=crop, loss__identity={"weight": 0.1})
        sizes = Counter(dataset.size_of(index) for index in range(len(dataset)))
        assert len(sizes) == 3 and min(sizes.values()) >= 4
        for index in range(len(dataset)):
            for flipped in (False, True):
                dataset.data = dataset.data.model_copy(update={"flip": flipped})
                visit = next(one for one in range(20) if dataset.draws(index, one).flip == flipped)
                sample, (width, height) = dataset[index, visit], dataset.size_of(index)
                assert sample["unreadable"] == [] and sample["pixels"].shape == (3, height, width)
                assert sample["mask"].shape == (1, height // 8, width // 8)
                assert sample["noise"].shape == sample["latent_noise"].shape == (4, height // 8, width // 8)
                red = (sample["pixels"][0] > 0.5) & (sample["pixels"][2] < 0)
                cells = torch.nn.functional.avg_pool2d(red.float()[None, None], 8)[0]
                assert (cells - sample["mask"]).abs().max() < 0.35 and (cells - sample["mask"]).abs().mean() < 0.05
                (place,) = sample["draws"].faces
                rows, columns = torch.nonzero(red, as_tuple=True)
                found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                limits = (width, height) * 2
                for value, expected, limit in zip(found, place.box, limits, strict=True):
                    assert abs(float(value) - min(max(expected, 0), limit)) <= 1.5
                if crop == "face":
                    assert all(-1 <= value <= limit + 1 for value, limit in zip(place.box, limits, strict=True))


def test_one_that_cannot_be_read_is_replaced_by_one_of_its_size(files, tmp_path, monkeypatch):
    dataset = make_dataset(files, tmp_path)
    broken = dataset.records[1].path
    opened = train.FaceDataset.__init__.__globals__["pictures"].open_photo

    def fail(path):
        if path == broken:
            raise TrainerError(f"{path}: not a readable picture")
        return opened(path)

    monkeypatch.setattr("trainer.data.pictures.open_photo", fail)
    for visit in range(8):
        sample = dataset[1, visit]
        assert sample["id"] != dataset.records[1].id and sample["unreadable"]
        assert sample["pixels"].shape[1:] == dataset.size_of(1)[::-1]


def test_the_index_knows_the_sizes(files, tmp_path):
    read = read_manifest(files[1])[0]
    indexed = open_manifest(str(files[1]), None, False, [tmp_path])
    config = make_config(*files, tmp_path, **ON)
    of_list, of_index = (
        Buckets.of(config.data).of_records(one)
        for one in (train.FaceDataset(read, config, TensorShapes()).records, indexed)
    )
    assert of_list.tolist() == of_index.tolist()
    parts = parts_by_bucket(of_index, range(3, 18))
    assert sorted(np.concatenate(parts).tolist()) == list(range(3, 18)) and all(len(part) for part in parts)


def test_trained_resumed_and_from_a_cache_the_same(files, tmp_path, monkeypatch):
    shapes = []
    encode = step.encode_batch
    monkeypatch.setattr(
        step, "encode_batch", lambda batch, *rest: shapes.append(tuple(batch.masks.shape)) or encode(batch, *rest)
    )
    changes = {**ON, "optimiser__lr": 1e-4, "train__steps": 8, "data__held_out": 0.3, "validation__loss_every": 4}
    train.train(make_config(*files, tmp_path / "whole", **changes))
    assert len({shape[2:] for shape in shapes[-8:]}) >= 2 and all(shape[0] == 4 for shape in shapes[-8:])
    train.train(make_config(*files, tmp_path / "parts", **{**changes, "train__steps": 4}))
    train.train(make_config(*files, tmp_path / "parts", **changes))
    assert largest_difference(weights(tmp_path / "whole", 8), weights(tmp_path / "parts", 8)) == 0.0
    cached = make_config(*files, tmp_path / "cached", **changes, data__cache=str(tmp_path / "cache"))
    make_cache(cached, progress=False)
    train.train(cached)
    assert largest_difference(weights(tmp_path / "whole", 8), weights(tmp_path / "cached", 8)) < 1e-5
    assert any("held-out loss" in json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__bucket_step": 24}, r"data.resolution \(64\) has to divide by data.bucket_step \(24\)"),
        ({"data__bucket_step": 16, "data__weights": [1.0]}, "data.bucket_step does not go with data.weights"),
        ({"data__bucket_step": 16, "data__shards": "x"}, "data.bucket_step does not go with data.shards"),
        ({"data__bucket_step": 4}, "bucket_step"),
        ({"data__bucket_step": 16, "data__bucket_ratio": 9.0}, "bucket_ratio"),
    ],
)
def test_refused(files, tmp_path, changes, told):
    with pytest.raises(TrainerError, match=told):
        make_config(*files, tmp_path, **changes)


def test_models_that_cannot_are_refused(files, tmp_path):
    config = make_config(*files, tmp_path, data__resolution=72, data__bucket_step=12)
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=10))
    for family, told in (("unidiffuser", "UniDiffuser knows squares only"), ("sd1", "needs a multiple of 8")):
        base = SimpleNamespace(family=family, cell=8, name="base", scheduler=scheduler)
        with pytest.raises(TrainerError, match=told):
            TensorShapes.of(base, 72, Buckets.of(config.data))
