"""Photos that cannot be read: replaced, named and counted, whatever the number of workers and however often resumed."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from support.small_training import largest_difference, make_config, make_models, make_photos, run, weights

from feedface_core.errors import FeedFaceError
from trainer import train
from trainer.data import pictures
from trainer.data.batch import Batch
from trainer.data.dataset import REPLACEMENTS, FaceDataset, TensorShapes, make_loader
from trainer.data.manifest import read_manifest
from trainer.data.order import GlobalBatches
from trainer.errors import TrainerError

SHAPES = TensorShapes((4, 8, 8))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def manifest(tmp_path):
    return make_photos(tmp_path / "photos")


@pytest.fixture(autouse=True)
def alone():
    yield
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def truncate(manifest, *names):
    for name in names:
        path = manifest.parent / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_dataset(manifest, **changes):
    config = make_config(manifest.parent, manifest, manifest.parent / "run", **changes)
    return FaceDataset(read_manifest(manifest)[0], config, SHAPES)


def batches(dataset, workers=0, **order):
    return list(make_loader(dataset, GlobalBatches(len(dataset), 4, 3, steps=9, **order), workers))


def same(first: Batch, second: Batch) -> bool:
    pairs = ((getattr(first, field.name), getattr(second, field.name)) for field in fields(Batch))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_samples_with_a_broken_photo_are_replaced_the_same_way_every_time(manifest):
    sound = batches(make_dataset(manifest))
    truncate(manifest, "3.png", "5-mask.png")
    broken = batches(make_dataset(manifest))
    named = {name for batch in broken for name, _ in batch.unreadable}
    assert named == {"3.png", "5.png"} and not {"3.png", "5.png"} & {name for batch in broken for name in batch.ids}
    reasons = dict(photo for batch in broken for photo in batch.unreadable)
    assert "3.png: not a readable picture" in reasons["3.png"] and "5-mask.png: not a readable mask" in reasons["5.png"]
    untouched = [(before, after) for before, after in zip(sound, broken, strict=True) if not after.unreadable]
    assert untouched and all(same(*pair) for pair in untouched)
    replaced = [(before, after) for before, after in zip(sound, broken, strict=True) if after.unreadable]
    for before, after in replaced:  # sample by sample
        own = [row for row, name in enumerate(before.ids) if before.ids[row] == after.ids[row]]
        assert torch.equal(before.pixels[own], after.pixels[own]) and torch.equal(before.noise[own], after.noise[own])
    assert len({name for _, after in replaced for name in after.ids}) > 4  # not always the same one
    for workers in (2, 4):
        assert all(map(same, broken, batches(make_dataset(manifest), workers)))
    assert all(map(same, broken[4:], batches(make_dataset(manifest), start=4)))
    shares = [batches(make_dataset(manifest), process=process, processes=2) for process in (0, 1)]
    assert [a.ids + b.ids for a, b in zip(*shares, strict=True)] == [batch.ids for batch in broken]


def test_broken_reference_is_named_and_not_the_photo_it_was_meant_for(manifest):
    truncate(manifest, "4.png")
    dataset = make_dataset(manifest, loss__face_dropout=0.0, data__references=1)
    partners = [0, 8]  # the others of that person
    drawn = [(index, visit) for index in partners for visit in range(10)]
    named = {name for entry in drawn for name, _ in dataset[entry]["unreadable"]}
    assert named == {"4.png"}
    assert any(not dataset[entry]["unreadable"] for entry in drawn)  # with the third photo it can be trained


def test_when_nothing_can_be_read_it_ends(manifest):
    truncate(manifest, *(f"{n}.png" for n in range(12)))
    with pytest.raises(TrainerError, match=f"nor can any of {REPLACEMENTS} others .* not a readable picture"):
        make_dataset(manifest)[0, 0]


def test_run_names_them_and_resumes_bit_for_bit(models, manifest, tmp_path, caplog):
    truncate(manifest, "3.png")
    whole = make_config(models, manifest, tmp_path / "whole")
    assert train.train(whole) is True
    told = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("3.png cannot be read") and "(1 such photos, at most 10)" in told[0]
    logged = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert logged[-1]["unreadable photos"] == 1
    first = make_config(models, manifest, tmp_path / "parts", train__steps=2)
    assert train.train(first) is True
    assert train.train(make_config(models, manifest, tmp_path / "parts", data__workers=2)) is True
    for name in ("trainables", "optimiser", "ema"):
        assert largest_difference(weights(tmp_path / "whole", 6, name), weights(tmp_path / "parts", 6, name)) == 0.0


def test_more_than_allowed_saves_and_stops(models, manifest, tmp_path, monkeypatch, capsys):
    healthy = shutil.copytree(manifest.parent, tmp_path / "healthy")
    truncate(manifest, "3.png", "5.png", "7.png")
    output = tmp_path / "run"
    config = make_config(models, manifest, output, data__unreadable_photos=2, train__checkpoint_every=100)
    monkeypatch.setattr(train, "parse", lambda _: config)
    assert train.main() == 1
    message = capsys.readouterr().err
    assert "3 photo(s) cannot be read, more than data.unreadable_photos=2 allows" in message
    assert all(f"{n}.png: not a readable picture" in message for n in (3, 5, 7))
    saved = sorted(output.glob("checkpoint-*"))
    assert len(saved) == 1 and f"A checkpoint of step {int(saved[0].name[-8:])} is written" in message
    for n in (3, 5, 7):  # mended, it goes on
        shutil.copyfile(healthy / f"{n}.png", manifest.parent / f"{n}.png")
    assert train.main() == 0 and (output / "checkpoint-00000006").is_dir()


@pytest.mark.slow
def test_two_processes_stop_together(models, manifest, tmp_path):
    truncate(manifest, "3.png")
    config = make_config(models, manifest, tmp_path / "run", data__unreadable_photos=0, train__steps=50)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "trainer.train", str(path)]
    result = run([sys.executable, *launch])
    assert result.returncode != 0
    assert "1 photo(s) cannot be read, more than data.unreadable_photos=0 allows" in result.stderr
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_whatever_is_wrong_with_a_file_it_is_an_error_of_the_picture(kind, tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    try:
        Image.fromarray(values).save(encoded, kind)
    except KeyError:
        pytest.skip(f"this Pillow has no {kind}")
    sound, chance, path, failed = encoded.getvalue(), random.Random(0), tmp_path / "broken", 0
    for number in range(150):
        broken = bytearray(sound)
        if number % 2:
            del broken[chance.randrange(len(broken)) :]
        for _ in range(chance.choice((1, 3, 30)) if broken else 0):
            broken[chance.randrange(min(len(broken), 300))] = chance.randrange(256)
        path.write_bytes(bytes(broken))
        for read in (pictures.open_photo, lambda file: pictures.read_mask(file, (64, 48))):
            try:
                read(path)
            except FeedFaceError:
                failed += 1
    assert failed > 50
