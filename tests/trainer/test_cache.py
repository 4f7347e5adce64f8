"""The cache gives what encoding would give, notices every change, and survives crashes."""

from __future__ import annotations

import errno
import json
import pickle
import shutil

import pytest
import torch
from PIL import Image
from support.small_training import make_config, make_models, make_photos
from transformers import CLIPTokenizer

from feedface_core.faces import crop as crops
from trainer import cache as command
from trainer.cache import fill_cache
from trainer.data import feature_store as store
from trainer.data import pictures
from trainer.data.dataset import FaceDataset, TensorShapes, make_loader
from trainer.data.manifest import read_manifest
from trainer.data.order import GlobalBatches
from trainer.data.references import Reference
from trainer.errors import TrainerError
from trainer.models.face_encoder import load_face_encoder
from trainer.models.feature_cache import FeatureCache, open_cache
from trainer.models.frozen_model import load_frozen_model
from trainer.training.step import encode_batch


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def parts(models):
    config = make_config(models, models, models)
    return load_frozen_model(config.model), load_face_encoder(config.adapter.encoder)


def make(config, records, base, encoder, process=0, processes=1):
    cache = FeatureCache(config, records, base, encoder)
    return fill_cache(cache, config, base, encoder, process, processes, progress=False)


class Run:
    """Photos, settings and frozen models of one test."""

    def __init__(self, models, parts, folder):
        self.models, self.folder = models, folder
        self.base, self.encoder = parts
        self.manifest = make_photos(folder / "photos", count=6, people=2)
        self.cache = folder / "cache"

    def config(self, **changes):
        return make_config(self.models, self.manifest, self.folder / "run", data__cache=str(self.cache), **changes)

    def records(self):
        return read_manifest(self.manifest)[0]

    def make(self, process=0, processes=1, **changes):
        return make(self.config(**changes), self.records(), self.base, self.encoder, process, processes)

    def open(self, **changes):
        return open_cache(self.config(**changes), self.records(), self.base, self.encoder)

    def edit(self, row, **changes):
        rows = [json.loads(line) for line in self.manifest.read_text().splitlines()]
        rows[row].update(changes)
        self.manifest.write_text("\n".join(json.dumps(entry) for entry in rows))


@pytest.fixture
def run(models, parts, tmp_path):
    return Run(models, parts, tmp_path)


def test_cached_features_are_those_of_the_photos(run):
    summary = run.make()
    # Two captions and the empty one; photos and faces both ways round.
    assert summary.computed == {"picture": 12, "text": 3, "face": 12}
    config, records = run.config(), run.records()
    shapes = TensorShapes.of(run.base, 64)
    plain, cached = FaceDataset(records, config, shapes), FaceDataset(records, config, shapes, run.open())
    batches = [make_loader(d, GlobalBatches(6, 4, 1, steps=6), w) for d, w in ((plain, 0), (cached, 0), (cached, 2))]
    flipped = dropped = 0
    for first, second, third in zip(*batches, strict=True):
        assert first.ids == second.ids and first.reference_counts == second.reference_counts
        assert second.pixels is None and second.crops is None
        expected, found, again = (encode_batch(b, run.base, run.encoder) for b in (first, second, third))
        torch.testing.assert_close(found.latents, expected.latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.text["states"], expected.text["states"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
        assert torch.equal(first.masks, second.masks) and torch.equal(first.noise, second.noise)
        assert torch.equal(again.latents, found.latents) and torch.equal(again.hidden, found.hidden)
        flipped += sum(
            cached.draws(records_index(records, i), v).flip for i, v in zip(first.ids, first.visits, strict=True)
        )
        dropped += sum(first.drop_text)
    assert 0 < flipped < 24 and dropped > 0  # both ways round and the empty caption were compared


def records_index(records, name):
    return [record.id for record in records].index(name)


def test_second_run_computes_nothing(run, monkeypatch):
    run.make()
    before = {path.name: path.read_bytes() for path in run.cache.iterdir()}
    for name in ("encode_pixels", "encode_text"):
        monkeypatch.setattr(type(run.base), name, lambda *_: pytest.fail("encoded again"))
    summary = run.make()
    assert summary.computed == {"picture": 0, "text": 0, "face": 0} and summary.found["picture"] == 12
    assert {path.name: path.read_bytes() for path in run.cache.iterdir()} == before


def test_only_what_depends_on_a_change_is_computed_again(run):
    run.make()
    run.edit(0, caption="something else")
    with pytest.raises(TrainerError, match="text: 1 of 4 features are missing .new or changed: 'something else'"):
        run.open()
    assert run.make().computed == {"picture": 0, "text": 1, "face": 0}
    photo = run.manifest.parent / "1.png"
    with Image.open(photo) as file:
        file.rotate(180).save(photo)
    with pytest.raises(TrainerError, match="picture: 2 of 12 features are missing .new or changed: 1.png"):
        run.open()
    assert run.make().computed == {"picture": 2, "text": 0, "face": 2}
    with Image.open(run.manifest.parent / "2-mask.png") as file:
        file.rotate(180).save(run.manifest.parent / "2-mask.png")
    assert run.make().computed == {"picture": 2, "text": 0, "face": 0}
    run.edit(3, square_bbox=[20, 10, 60, 50])
    assert run.make().computed == {"picture": 2, "text": 0, "face": 2}
    run.open()


def test_touched_photo_with_the_same_contents_is_not_stale(run):
    run.make()
    photo = run.manifest.parent / "1.png"
    photo.write_bytes(photo.read_bytes())
    run.open()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__resolution": 128}, "picture: 12 of 12 features are missing (data.resolution is 128, in the cache 64)"),
        ({"data__crop": "centre"}, "data.crop is centre, in the cache face"),
    ],
)
def test_cache_of_other_settings_is_refused(run, changes, expected):
    run.make()
    with pytest.raises(TrainerError) as error:
        run.open(**changes)
    assert expected in str(error.value) and "Run python -m trainer.cache" in str(error.value)


def test_cache_of_other_models_is_refused(run, tmp_path):
    run.make()
    from tools.tiny_diffusers import make_base

    make_base(tmp_path / "other/base", seed=5)
    config = run.config(model__base=str(tmp_path / "other/base"))
    other = load_frozen_model(config.model)
    with pytest.raises(TrainerError) as error:
        open_cache(config, run.records(), other, run.encoder)
    text = str(error.value)
    assert "picture: 12 of 12" in text and f"autoencoder is {other.fingerprint(['autoencoder'])}" in text
    assert "text: 3 of 3" in text and "face:" not in text
    encoder = load_face_encoder(run.config().adapter.encoder.model_copy(update={"layer": -1}))
    with pytest.raises(TrainerError, match="face: 12 of 12 .*adapter.encoder.layer is -1, in the cache -2"):
        open_cache(run.config(), run.records(), run.base, encoder)


@pytest.mark.parametrize("change", ["padding", "vocabulary"])
def test_cache_of_another_tokenizer_is_refused(run, change, tmp_path):
    run.make()
    folder = shutil.copytree(run.models / "base", tmp_path / "base")
    if change == "padding":
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        assert tokenizer.pad_token_id != 0
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        shutil.rmtree(folder / "tokenizer")  # its special_tokens_map.json would win
        tokenizer.save_pretrained(folder / "tokenizer")
    for path in (folder / "tokenizer").glob("*.json"):
        values = json.loads(path.read_text())
        vocabulary = values.get("model", {}).get("vocab") or values
        if change == "vocabulary" and "h" in vocabulary:
            vocabulary["h"], vocabulary["o"] = vocabulary["o"], vocabulary["h"]
            path.write_text(json.dumps(values))
    config = run.config(model__base=str(folder))
    other = load_frozen_model(config.model)
    text = "tokenizer is [0-9a-f]+, in the cache [0-9a-f]+"
    with pytest.raises(TrainerError, match=f"text: 3 of 3 features are missing .{text}.") as error:
        open_cache(config, run.records(), other, run.encoder)
    assert "picture" not in str(error.value) and "face" not in str(error.value)
    summary = make(config, run.records(), other, run.encoder)
    assert summary.computed == {"picture": 0, "text": 3, "face": 0}
    found = open_cache(config, run.records(), other, run.encoder)["text"].get(run.records()[0].caption)["states"]
    assert torch.equal(found, other.encode_text([run.records()[0].caption])["states"][0])
    assert not torch.equal(found, run.open()["text"].get(run.records()[0].caption)["states"])


@pytest.mark.parametrize(("module", "kind", "other"), [(pictures, "picture", "face"), (crops, "face", "picture")])
def test_cache_of_older_code_is_refused(run, monkeypatch, module, kind, other):
    run.make()
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    with pytest.raises(TrainerError, match=f"{kind}: 12 of 12 .*version of the .* code is 2, in the cache 1") as error:
        run.open()
    assert f"{other}:" not in str(error.value)
    assert run.make().computed == {"picture": 0, "text": 0, "face": 0} | {kind: 12}


def test_flips_are_only_made_when_wanted(run):
    assert run.make(data__flip=False).computed == {"picture": 6, "text": 3, "face": 6}
    run.open(data__flip=False)
    with pytest.raises(TrainerError, match="picture: 6 of 12 features are missing"):
        run.open()
    assert run.make().computed == {"picture": 6, "text": 0, "face": 6}


def test_missing_folder_says_how_to_make_it(run):
    with pytest.raises(TrainerError, match="no such folder. Make it with python -m trainer.cache"):
        run.open()


def test_broken_shard_is_ignored_and_made_again(run, caplog):
    run.make()
    shard = next(run.cache.glob("face-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(TrainerError, match="face: 12 of 12 features are missing"):
        run.open()
    assert "not a whole shard" in caplog.text
    assert run.make().computed == {"picture": 0, "text": 0, "face": 12}
    run.open()


def test_shard_that_vanishes_during_training_is_named(run):
    run.make()
    cache = run.open()
    shard = next(run.cache.glob("face-*.safetensors"))
    shard.unlink()
    with pytest.raises(TrainerError, match=shard.name):
        cache["face"].get(Reference(0))


def test_killed_run_keeps_its_whole_shards(run, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 1)  # one feature a shard
    encode = type(run.base).encode_text

    def stop(self, captions):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(run.base), "encode_text", stop)
    with pytest.raises(KeyboardInterrupt):
        run.make()
    assert len(list(run.cache.glob("picture-*.safetensors"))) == 12
    monkeypatch.setattr(type(run.base), "encode_text", encode)
    (run.cache / ".face-0.safetensors.1.tmp").write_bytes(b"x")  # left by the kill, never read
    assert run.make().computed == {"picture": 0, "text": 3, "face": 12}
    run.open()


def test_processes_make_a_part_each(run):
    caches = [FeatureCache(run.config(), run.records(), run.base, run.encoder) for _ in range(2)]
    for process, cache in enumerate(caches):
        fill_cache(cache, run.config(), run.base, run.encoder, process, 2, progress=False)
    for features in caches[0].values():  # the first knows of what the second wrote after it
        features.read_index()
        assert features.shards and features.unused() == []
    for path in run.cache.glob("*.safetensors"):
        path.unlink()
    missing = [run.make(process, 2).computed["picture"] for process in (1, 0)]
    assert missing[0] == 12 and 0 < missing[1] < 12  # the second to start found what the first had made
    assert len(list(run.cache.glob("picture-*.safetensors"))) == 2
    run.open()


def test_full_disk_is_said_and_leaves_no_part(run, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(TrainerError, match="cannot be written: the disk is full. What was written before is kept"):
        run.make()
    assert not list(run.cache.glob("*.safetensors")) and not list(run.cache.glob(".*"))


def test_unreadable_photos_are_listed_after_everything_else_is_done(run):
    (run.manifest.parent / "4.png").write_bytes(b"not a picture")
    Image.new("L", (96, 80), 0).save(run.manifest.parent / "5-mask.png")
    Image.new("L", (96, 80), 255).save(run.manifest.parent / "3-mask.png")
    summary = run.make()
    assert list(summary.unreadable) == ["4.png"] and "not a readable picture" in summary.unreadable["4.png"]
    assert summary.empty_masks == ["5.png"] and summary.full_masks == ["3.png"]
    with pytest.raises(TrainerError, match="picture: 2 of 12 features are missing .new or changed: 4.png"):
        run.open()


def test_features_go_to_workers_that_are_spawned(run):
    run.make()
    features = run.open()["picture"]
    features.get((0, False))
    again = pickle.loads(pickle.dumps(features))
    assert torch.equal(again.get((1, True))["moments"], features.get((1, True))["moments"])


def test_cache_of_a_narrow_base_is_not_narrower(run, tmp_path):
    """Moments and hidden states as in float32; text states as the U-Net reads them, bit for bit."""
    run.make()
    exact = run.open()
    config = run.config(model__precision="bf16")
    base, encoder = load_frozen_model(config.model), load_face_encoder(config.adapter.encoder)
    with pytest.raises(TrainerError, match="text: 3 of 3 .*format is torch.bfloat16, in the cache torch.float32"):
        open_cache(config, run.records(), base, encoder)
    with torch.autocast("cpu", torch.bfloat16):
        summary = make(config, run.records(), base, encoder)
    assert summary.computed == {"picture": 0, "text": 3, "face": 0}  # the encoders are the same ones
    found = open_cache(config, run.records(), base, encoder)
    assert torch.equal(found["picture"].get((0, True))["moments"], exact["picture"].get((0, True))["moments"])
    assert torch.equal(found["face"].get(Reference(0, True))["hidden"], exact["face"].get(Reference(0, True))["hidden"])
    caption = run.records()[0].caption
    text, wide = (cache["text"].get(caption)["states"] for cache in (found, exact))
    assert text.dtype == torch.bfloat16 and torch.equal(text, wide.to(torch.bfloat16))
    encoded = base.encode_text([caption])["states"][0]
    assert torch.equal(encoded, wide)  # without a cache it is the same number that the U-Net reads


def test_command_line_makes_prunes_and_reports(run, capsys):
    import yaml

    path = run.folder / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(run.config().to_json())))
    assert command.main([str(path)]) == 0
    assert "picture        12 computed        0 found" in capsys.readouterr().out
    assert command.main([str(path), "data.resolution=128"]) == 0
    assert "1 shard(s)" in (text := capsys.readouterr().out) and "--prune deletes them" in text
    assert command.main([str(path), "data.resolution=128", "--prune"]) == 0
    assert len(list(run.cache.glob("picture-*.safetensors"))) == 1
    (run.folder / "file").touch()
    assert command.main([str(path), f"data.cache={run.folder}/file/cache"]) == 1
    assert "cannot be written: Not a directory" in capsys.readouterr().err
    assert command.main([str(path), "data.cache=null"]) == 1
    assert "data.cache is null" in capsys.readouterr().err
    assert command.main([str(path), "data.manifest=gone.jsonl"]) == 1
    assert "manifest gone.jsonl: no such file" in capsys.readouterr().err
    (run.manifest.parent / "4.png").write_bytes(b"not a picture")
    assert command.main([str(path)]) == 1
    assert "1 photo(s) or masks cannot be read" in capsys.readouterr().err
