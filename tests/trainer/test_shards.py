"""Training from shards is training from the photos' cache, wherever the shards lie and however often it stops."""

from __future__ import annotations

import functools
import json
import logging
import os
import pickle
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.small_training import largest_difference, make_config, make_models, make_photos, weights

from trainer import cache as command
from trainer.cache import fill_cache, make_shards
from trainer.data.dataset import FaceDataset, TensorShapes, make_loader
from trainer.data.manifest import Record, read_manifest, write_rows
from trainer.data.order import GlobalBatches
from trainer.data.records import Records
from trainer.data.shards import open_records, shard_name
from trainer.errors import TrainerError
from trainer.models.face_encoder import load_face_encoder
from trainer.models.feature_cache import FeatureCache, open_cache
from trainer.models.frozen_model import load_frozen_model
from trainer.models.pack import arrange, open_shards
from trainer.train import train


class Run:
    """Photos and shards of them, three photos each, of which two people have four and four, and one has one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder, make_models(folder / "models")
        self.manifest = make_photos(folder / "photos", count=9, people=2)
        rows = [json.loads(line) for line in self.manifest.read_text().splitlines()]
        rows[4] |= {"identity": "somebody else", "caption": ""}
        del rows[5]["width"], rows[5]["height"]
        write_rows(self.manifest, rows)
        self.config = make_config(self.models, self.manifest, folder / "run", data__augment_variants=3)
        self.base = load_frozen_model(self.config.model)
        self.encoder = load_face_encoder(self.config.adapter.encoder)
        self.shards = folder / "shards"
        self.made = make_shards(self.config, self.shards, 3, progress=False)

    def of(self, address, **changes):
        """The configuration of a run on shards."""
        config = make_config(
            self.models, "gone.jsonl", self.folder / "run", data__augment_variants=3, data__shards=str(address)
        )
        return config.model_copy(update={"data": config.data.model_copy(update=changes)})

    def dataset(self, address, copies=None, **changes):
        config = self.of(address, **changes)
        records = open_records(str(address), copies or self.folder / "copies")
        features = open_shards(config, records, self.base, self.encoder)
        return FaceDataset(records, config, TensorShapes.of(self.base, 64), features)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(run.shards, tmp_path / "shards"))


def batches(dataset, workers=0, start=0, **order):
    return list(make_loader(dataset, GlobalBatches(len(dataset), 4, 3, 9, start=start, **order), workers))


def assert_same(first, second):
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert one.ids == two.ids and one.captions == two.captions and one.reference_counts == two.reference_counts
        for name in ("moments", "masks", "hidden", "noise", "timesteps"):
            a, b = getattr(one, name), getattr(two, name)
            assert (a is None and b is None) or torch.equal(a, b), name
        assert one.text.keys() == two.text.keys() and all(
            torch.equal(one.text[name], two.text[name]) for name in one.text
        )


@pytest.fixture(scope="module")
def cached(run, tmp_path_factory):
    """The batches of the same photos by the cache."""
    config = run.config.model_copy(
        update={"data": run.config.data.model_copy(update={"cache": str(tmp_path_factory.mktemp("cache"))})}
    )
    records = read_manifest(run.manifest)[0]
    fill_cache(FeatureCache(config, records, run.base, run.encoder), config, run.base, run.encoder, progress=False)
    cache = open_cache(config, records, run.base, run.encoder)
    return batches(FaceDataset(records, config, TensorShapes.of(run.base, 64), cache))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_cache(run, cached, workers):
    dataset = run.dataset(run.shards)
    assert_same(batches(dataset, workers), cached)
    assert sum(sum(batch.reference_counts) for batch in cached) > 40 and any(any(batch.drop_text) for batch in cached)
    assert dataset.described()["fingerprint"] == Records(read_manifest(run.manifest)[0]).fingerprint
    assert_same(batches(pickle.loads(pickle.dumps(dataset)), start=5), cached[5:])
    halves = [batches(dataset, process=process, processes=2) for process in (0, 1)]
    assert [a.ids + b.ids for a, b in zip(*halves, strict=True)] == [batch.ids for batch in cached]


def test_no_photo_is_asked_for(run, cached, tmp_path):
    moved = run.manifest.parent.rename(tmp_path / "elsewhere")
    try:
        assert_same(batches(run.dataset(run.shards)), cached)
        assert run.dataset(run.shards).records[5].width == 96  # although the manifest does not say it
    finally:
        moved.rename(run.manifest.parent)


def test_people_lie_together_and_each_file_is_hashed_once(run, tmp_path, monkeypatch):
    records = open_records(str(run.shards), tmp_path)
    order, borders = arrange(records.people, 9, 3)
    people = [
        [records[int(index)].identity for index in order[a:b]] for a, b in zip(borders, borders[1:], strict=False)
    ]
    assert people == [["person 0"] * 3, ["person 0"], ["person 1"] * 3, ["person 1", "somebody else"]]
    assert run.made.computed["shards"] == 4
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), read_bytes(path))[1])
    make_shards(run.config, tmp_path / "shards", 3, progress=False)
    photos = [name for name in read if name.endswith(".png")]
    assert sorted(photos) == sorted(path.name for path in run.manifest.parent.glob("*.png")) and len(photos) == 18
    read.clear()
    again = make_shards(run.config, tmp_path / "shards", 3, progress=False)
    assert again.found["shards"] == 4 and not [name for name in read if name.endswith(".png")]


@pytest.mark.parametrize("photos", [1, 2, 5, 100])
def test_arrangement_holds_everybody_once(photos):
    draw = np.random.default_rng(photos)
    names = [None if person > 20 else f"p{person}" for person in draw.integers(0, 30, 200)]
    records = Records(Record(id=str(n), path=Path("a"), bbox=(0, 0, 9, 9), identity=own) for n, own in enumerate(names))
    order, borders = arrange(records.people, 200, photos)
    assert sorted(order.tolist()) == list(range(200)) and borders[0] == 0 and borders[-1] == 200
    assert all(0 < end - begin <= photos for begin, end in zip(borders, borders[1:], strict=False))
    for begin in borders[1:-1]:  # somebody is divided only if a shard cannot hold all of them
        before, after = (records[int(order[place])].identity for place in (begin - 1, begin))
        assert before is None or before != after or names.count(before) > photos


def test_only_changed_shards_are_written_again(run, tmp_path):
    photos = shutil.copytree(run.manifest.parent, tmp_path / "photos")
    config = make_config(run.models, photos / "manifest.jsonl", tmp_path / "run")
    shards = tmp_path / "shards"
    make_shards(config, shards, 3, progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in shards.glob("shard-*")}
    shutil.copyfile(photos / "7.png", photos / "1.png")  # of person 1, in the third shard
    summary = make_shards(config, shards, 3, progress=False)
    assert summary.computed["shards"] == 1 and summary.found["shards"] == 3
    changed = [name for name, time in before.items() if (shards / name).stat().st_mtime_ns != time]
    assert changed == [shard_name(2)]
    make_shards(config, shards, 9, progress=False)
    assert len(list(shards.glob("shard-*"))) == 1  # those of the earlier set are gone
    (photos / "3.png").write_bytes(b"no picture")
    with pytest.raises(TrainerError, match="photo.s. or masks cannot be read; .*\n.*3.png"):
        make_shards(config, shards, 9, progress=False)


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped", "empty"])
def test_damaged_shard_is_skipped_counted_and_named(run, copied, cached, damage):
    path = copied / shard_name(2)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-len(content) // 2 :: 97] = bytes(255 - value for value in content[-len(content) // 2 :: 97])
    path.unlink() if damage == "gone" else path.write_bytes(
        {"cut": content[: len(content) // 3], "flipped": content, "empty": b""}[damage]
    )
    found = batches(run.dataset(copied))
    named = {name for batch in found for name, _ in batch.unreadable}
    assert named == {path.name}
    assert_same(batches(run.dataset(copied), 2), found)  # the same samples take its place everywhere
    kept = [i for i, batch in enumerate(found) if not batch.unreadable]
    assert_same([found[i] for i in kept], [cached[i] for i in kept])


def test_shards_of_other_settings_are_refused(run, copied, tmp_path):
    for changes, expected in (
        ({"resolution": 128}, "picture: data.resolution is 128, in the shards 64"),
        ({"augment_variants": 4}, "data.augment_variants is 4, in the shards 3"),
        ({"retrieval": False}, "data.retrieval is False, in the shards True"),
    ):
        with pytest.raises(TrainerError, match=expected):
            run.dataset(run.shards, **changes)
    run.dataset(run.shards, flip=False)  # what is there and not used does no harm
    with pytest.raises(TrainerError, match="holds no header.json. Make the shards with"):
        run.dataset(tmp_path)
    with pytest.raises(TrainerError, match="data.shards nowhere://x: Protocol not known"):
        run.dataset("nowhere://x")
    (copied / "index/places.arrow").write_bytes(b"")
    with pytest.raises(TrainerError, match="places.arrow: damaged"):
        run.dataset(copied)
    (copied / "header.json").write_text('{"format": "feedface-shards-1"}')
    with pytest.raises(TrainerError, match="header.json cannot be read"):
        run.dataset(copied)


@pytest.fixture
def web(run):
    """The shards at an address; Python's own server knows no ranges."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(run.shards))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def bucket(run, monkeypatch):
    """The shards in a bucket of a local S3."""
    pytest.importorskip("s3fs")
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="faces")
    for path in run.shards.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "faces", f"set/{path.relative_to(run.shards).as_posix()}")
    yield "s3://faces/set"
    server.stop()


@pytest.mark.parametrize("place", ["web", "bucket"])
def test_shards_elsewhere(run, cached, request, place, tmp_path):
    address = request.getfixturevalue(place)
    dataset = run.dataset(address, tmp_path / "copies")
    assert_same(batches(dataset, 0, start=7), cached[7:])
    assert_same(batches(dataset, 2, start=5), cached[5:])
    again = [os.stat(path).st_mtime_ns for path in (tmp_path / "copies").rglob("*.arrow")]
    run.dataset(address, tmp_path / "copies")
    assert [os.stat(path).st_mtime_ns for path in (tmp_path / "copies").rglob("*.arrow")] == again and len(again) == 3


def test_command_line_writes_shards_that_train_as_photos_do(run, tmp_path, capsys, alone):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(run.config.to_json())))
    assert command.main([str(path), "--shards", str(tmp_path / "shards"), "--shard-photos", "4"]) == 0
    assert "shards" in capsys.readouterr().out
    for name, changes in {
        "cache": {"cache": str(tmp_path / "c")},
        "shards": {"shards": str(tmp_path / "shards")},
    }.items():
        values = run.config.model_dump()
        values["data"] |= changes | ({"manifest": "gone.jsonl"} if name == "shards" else {})
        values["train"] |= {"output": str(tmp_path / name), "steps": 4}
        config = type(run.config).load(**values)
        if name == "cache":
            command.make_cache(config, progress=False)
        assert train(config)
    assert largest_difference(*(weights(tmp_path / name, 4) for name in ("cache", "shards"))) == 0
