"""Training a face into the text's tokens, and a second stream for the background."""

from __future__ import annotations

import json

import pytest
import torch
from support.adapter_kinds import STREAMS, TEXT, batch_of, config_of, first_of, train_whole_and_in_parts
from support.recognisers import need_dlib
from support.small_training import make_config, make_models, make_photos

from feedface_core.conditioning import Face
from feedface_core.faces import load_image
from feedface_core.faces.background import background_picture, largest_square
from feedface_core.files.adapter_file import load_adapter
from trainer import export, train
from trainer.data.batch import collate
from trainer.data.manifest import read_manifest
from trainer.data.reading import read_background
from trainer.models.adapter import load_models
from trainer.training.step import AdapterStep


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("streams")
    return make_models(root / "models"), make_photos(root / "photos")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", first_of(STREAMS))
def test_it_learns_and_goes_on_where_it_stopped(files, tmp_path, kind):
    train_whole_and_in_parts(files, tmp_path, kind)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", first_of([kind for kind in STREAMS if "background" in kind]))
def test_cached_features_train_alike(files, tmp_path, kind):
    from trainer import cache

    plain = config_of(files, tmp_path / "photos", kind, data__flip=True)
    cached = config_of(files, tmp_path / "cached", kind, data__flip=True, data__cache=str(tmp_path / "cache"))
    (tmp_path / "cached.json").write_text(cached.to_json())
    assert cache.main([str(tmp_path / "cached.json")]) == 0
    assert train.train(plain) and train.train(cached)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("photos", "cached")
    ]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("null", first_of(["learned", "none"]))
@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize(("face", "background"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5)])
def test_every_weight_has_a_gradient_in_every_batch(files, tmp_path, kind, null, face, background):
    """Several processes wait for the gradient of each: also for what a batch does not reach."""
    drops = {"loss__face_dropout": face, "loss__background_dropout": background}
    config = config_of(files, tmp_path, kind, adapter__dropped_face=null, **drops)
    models = load_models(config, "cpu")
    for stream in models.adapter.streams:
        for branch in stream.branches:
            torch.nn.init.normal_(branch.zero_linear.weight, std=0.1)
    _, batch = batch_of(config, models)
    loss, _ = AdapterStep(models, config.loss)(batch)
    loss.backward()
    without = [name for name, value in models.adapter.named_parameters() if value.grad is None]
    assert without == []
    reached = any(bool(value.grad.any()) for value in models.adapter.parameters())
    shown = not (face == 1.0 and null == "none") or (models.adapter.background is not None and background < 1.0)
    assert reached == shown


@pytest.mark.parametrize("kind", [kind for kind in STREAMS if "background" in kind])
def test_each_row_gets_its_own_face_and_background(files, tmp_path, kind):
    """The rows of a batch are those that each sample has by itself."""
    drops = {"loss__face_dropout": 0.4, "loss__background_dropout": 0.4, "loss__kind": "standard"}
    config = config_of(files, tmp_path, kind, adapter__dropped_face="learned", **drops)
    models = load_models(config, "cpu")
    for stream in models.adapter.streams:
        torch.nn.init.normal_(stream.null_tokens)
        for branch in stream.branches:
            torch.nn.init.normal_(branch.zero_linear.weight, std=0.1)
    dataset, _ = batch_of(config, models)

    def cases(visit):
        draws = [dataset.draws(index, visit) for index in range(12)]
        return {(draw.drop_face, draw.drop_background) for draw in draws}

    visit = next(visit for visit in range(100) if len(cases(visit)) == 4)
    batch = collate([dataset[index, visit] for index in range(12)])
    step = AdapterStep(models, config.loss)
    with torch.no_grad():
        loss, record = step(batch)
        single = [step(collate([dataset[index, visit]])) for index in range(12)]
    losses = dict(zip(record.ids, record.losses.tolist(), strict=True))
    for _, one in single:
        assert losses[one.ids[0]] == pytest.approx(float(one.losses[0]), rel=1e-4)


def test_the_background_is_what_the_node_makes_of_the_photo(files):
    records, _ = read_manifest(files[1])
    for record in records[:4]:
        photo = load_image(record.path)
        expected = background_picture(photo, [record.square], 64, 1.0)
        found = read_background(record, 64, "face")
        assert (found - expected).abs().max() < 1 / 255, "but for the rounding of grey"
        left, top, side = largest_square(photo.shape[1], photo.shape[0], record.square)
        middle = [(record.square[axis] + record.square[axis + 2]) / 2 for axis in (0, 1)]
        x, y = int((middle[0] - left) * 64 / side), int((middle[1] - top) * 64 / side)
        assert (found[y, x] - 0.5).abs().max() < 1 / 255, "the face is gone"


@pytest.mark.usefixtures("alone")
def test_export_and_random_faces(files, tmp_path):
    config = config_of(files, tmp_path / "run", "text with a background", train__steps=2)
    assert train.train(config)
    found = load_adapter(export.export(tmp_path / "run", statistics=8))
    assert found.config.text_tokens.offset == 0 and found.config.background.text_tokens.offset == 2
    assert found.statistics.mean.shape == (1, found.config.encoder.width)
    one, other = found.statistics.draw(1), found.statistics.draw(2)
    assert isinstance(one, Face) and not torch.equal(one.hidden, other.hidden)
    assert load_adapter(export.export(tmp_path / "run", tmp_path / "plain.safetensors")).statistics is None


def test_text_tokens_have_the_width_of_the_text(files, tmp_path):
    config = config_of(files, tmp_path, "text", adapter__context_width=8)
    with pytest.raises(train.TrainerError, match="context_width is 8"):
        load_models(config, "cpu")


def test_text_tokens_need_one_vector(files, tmp_path):
    encoder = {"path": str(files[0] / "clip"), "image_size": 64}
    config = make_config(*files, tmp_path, **{**TEXT, "adapter__encoder": encoder})
    with pytest.raises(train.TrainerError, match="pooling"):
        load_models(config, "cpu")


@pytest.mark.usefixtures("alone")
def test_a_recogniser_in_the_place_of_clip(files, tmp_path):
    """Face0 with vectors of a recogniser: trained, exported, and drawn from in statistics."""
    need_dlib()
    encoder = {"recogniser": "dlib", "image_size": 64}
    text = {"count": 2, "layers": 2, "width": 16}
    config = make_config(*files, tmp_path / "run", adapter__encoder=encoder, adapter__text_tokens=text, train__steps=2)
    assert train.train(config)
    found = load_adapter(export.export(tmp_path / "run", statistics=8))
    described = found.config.encoder
    assert (described.type, described.name, described.fingerprint) == ("recogniser", "dlib", "dlib")
    assert (described.width, described.tokens, described.included) == (128, 1, False) and not found.encoder_tensors
    assert found.statistics.mean.shape == (1, 128)


@pytest.mark.parametrize("encoder", [{}, {"path": "clip", "recogniser": "dlib"}, {"recogniser": "other"}])
def test_an_encoder_is_one_thing(files, tmp_path, encoder):
    with pytest.raises(train.TrainerError, match="encoder"):
        make_config(*files, tmp_path, adapter__encoder={"image_size": 64, **encoder})
