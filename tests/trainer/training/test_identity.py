"""The identity loss: what is decoded, what it is worth, and where its gradient goes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from facenet_pytorch import InceptionResnetV1
from safetensors.torch import save_file
from support.small_training import make_config, make_models, make_photos
from torch.nn import functional

from feedface_core.faces import cut_squares
from trainer.cache import make_cache
from trainer.data.batch import collate
from trainer.data.dataset import FaceDataset, TensorShapes
from trainer.data.manifest import read_manifest
from trainer.data.reading import read_crop
from trainer.errors import TrainerError
from trainer.models.adapter import load_models
from trainer.models.feature_cache import open_cache
from trainer.training.step import AdapterStep

STEPS = torch.tensor([10, 900, 240, 250, 60, 100])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("identity")
    return make_models(root / "models"), make_photos(root / "photos"), root


class Case:
    """A step and a batch of six samples at :data:`STEPS`, the fifth without its face; photos of four people."""

    def __init__(self, files, cached=False, **identity):
        models, manifest, self.root = files
        changes = {"loss__identity": identity, "loss__face_dropout": 0.0, "data__augment_variants": 0}
        self.config = make_config(models, manifest, self.root / "run", **changes, data__cache=str(self.root / "cache"))
        self.models = load_models(self.config, "cpu")
        torch.manual_seed(0)
        for branch in self.models.adapter.branches:
            torch.nn.init.normal_(branch.zero_linear.weight, std=0.2)
        self.records, _ = read_manifest(manifest)
        stores = open_cache(self.config, self.records, self.models.frozen, self.models.encoder) if cached else None
        dataset = FaceDataset(self.records, self.config, TensorShapes.of(self.models.frozen, 64), stores)
        samples = [dataset[index, 0] for index in range(6)]
        gone = samples[4]["draws"]
        samples[4] |= {"draws": dataclasses.replace(gone, drop_face=True, references=()), "crops": [], "hidden": []}
        self.batch = dataclasses.replace(collate(samples), timesteps=STEPS.clone())
        self.step = AdapterStep(self.models, self.config.loss, self.config.adapter.combination)

    def run(self):
        """The loss, the record, and the gradients."""
        self.models.adapter.zero_grad()
        loss, record = self.step(self.batch)
        loss.backward()
        return loss.detach(), record, [value.grad.clone() for value in self.models.adapter.parameters()]


def test_without_weight_nothing_is_decoded_and_nothing_changes(files, monkeypatch):
    plain, off = Case(files), Case(files, below=0.9, temperature=0.5)
    monkeypatch.setattr(off.models.frozen, "decode", None)  # calling it would raise
    loss, record, gradients = plain.run()
    other_loss, other_record, other = off.run()
    assert torch.equal(loss, other_loss) and torch.equal(record.losses, other_record.losses)
    assert all(map(torch.equal, gradients, other)) and record.values.keys() == other_record.values.keys()


def test_only_faces_below_the_noise_level_are_decoded_one_at_a_time(files, monkeypatch):
    case, decoded = Case(files, weight=1.0, below=0.25), []
    decode = case.models.frozen.decode
    count = lambda latents, gradient=False: decoded.append((len(latents), gradient)) or decode(latents, gradient)  # noqa: E731
    monkeypatch.setattr(case.models.frozen, "decode", count)
    loss, record = case.step(case.batch)
    assert decoded == [(1, True)] * 3  # of the samples at 10, 240 and 100
    assert record.values["identity/likeness"].shape == (3,) and "identity/contrastive" not in record.values
    loss.backward()
    assert len(decoded) == 6  # once more, in place of keeping the activations


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_loss_is_the_written_out_one(files, prediction):
    case = Case(files, weight=0.5, contrastive=2.0, temperature=0.2)
    case.models.frozen.scheduler.register_to_config(
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    )
    plain = AdapterStep(dataclasses.replace(case.models, recogniser=None), case.config.loss)
    seen, predict, frozen = {}, case.models.frozen.predict, case.models.frozen

    def keep(noisy, timesteps, text, rows=None):
        found = predict(noisy, timesteps, text, rows)
        if rows is not None:
            seen.update(noisy=noisy, prediction=found)
        return found

    case.models.frozen.predict = keep
    whole, _, gradients = case.run()
    case.models.adapter.zero_grad()
    loss, _ = plain(case.batch)
    kept = [0, 1, 2, 3, 5]
    encoder, settings = case.models.encoder, case.models.encoder.config
    tokens = functional.normalize(encoder.encode(case.batch.crops)[:, 0], dim=-1)
    counts = [case.batch.reference_counts[row] for row in kept]
    references = [functional.normalize(own.sum(0), dim=-1) for own in tokens.split(counts)]
    people = [case.records[row].identity for row in kept]
    for place in (0, 2, 4):
        level = frozen.scheduler.alphas_cumprod[STEPS[kept[place]]]
        noisy, found = seen["noisy"][place : place + 1], seen["prediction"][place : place + 1]
        clean = (noisy - (1 - level).sqrt() * found) / level.sqrt()
        if prediction == "v":
            clean = level.sqrt() * noisy - (1 - level).sqrt() * found
        [autoencoder] = frozen.component("autoencoder")
        picture = (autoencoder.decode(clean / 0.18215).sample + 1) / 2
        crop = cut_squares(picture, [case.batch.faces[kept[place]][0].square], 64)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (settings.image_mean, settings.image_std))
        states = encoder.module(pixel_values=(crop - mean) / std, output_hidden_states=True).hidden_states[-2]
        vector = functional.normalize(states[:, 0], dim=-1)[0]
        own = vector @ references[place]
        others = [vector @ references[i] for i in range(5) if people[i] != people[place]]
        assert 0 < len(others) < 5
        contrast = -torch.log_softmax(torch.stack([own, *others]) / 0.2, 0)[0]
        loss = loss + (0.5 * (1 - own) + 2.0 * contrast) / 6
    loss.backward()
    assert whole.item() == pytest.approx(loss.item(), rel=1e-4)
    for found, wanted in zip(gradients, case.models.adapter.parameters(), strict=True):
        torch.testing.assert_close(found, wanted.grad, rtol=1e-3, atol=1e-6)


def test_its_gradient_is_its_slope(files):
    case = Case(files, weight=50.0, below=1.0)
    weight = case.models.adapter.branches[0].zero_linear.weight
    *_, gradients = case.run()
    names = [name for name, _ in case.models.adapter.named_parameters()]
    gradient = gradients[names.index("branches.0.zero_linear.weight")]
    way, losses = gradient / gradient.norm(), []
    with torch.no_grad():
        for shift in (1e-2, -1e-2):
            weight += shift * way
            losses.append(case.step(case.batch)[0].item())
            weight -= shift * way
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(gradient.norm().item(), rel=0.02)


def test_training_with_it_makes_faces_more_alike(files):
    case = Case(files, weight=100.0, below=1.0)
    optimiser, found = torch.optim.Adam(case.models.adapter.parameters(), lr=1e-3), []
    for _ in range(4):
        optimiser.zero_grad()
        loss, record = case.step(case.batch)
        loss.backward()
        optimiser.step()
        found.append(record.values["identity/likeness"].mean().item())
    assert found[-1] > found[0]


@pytest.mark.parametrize("flip", [False, True])
def test_a_face_is_where_the_training_picture_shows_it(files, flip, monkeypatch):
    case = Case(files, weight=1.0)
    dataset = FaceDataset(case.records, case.config, TensorShapes.of(case.models.frozen, 64))
    for index in range(6):
        draws = dataclasses.replace(dataset.draws(index, 0), flip=flip)
        monkeypatch.setattr(dataset, "draws", lambda *_, draws=draws: draws)
        sample = dataset[index, 0]
        square = dataset.shown(index, flip)[1][0].square
        found = cut_squares((sample["pixels"][None] + 1) / 2, [square], 64)[0].movedim(0, -1)
        wanted = read_crop(case.records[index], 64)
        wanted = wanted.flip(1) if flip else wanted
        assert (found - wanted)[8:-8, 8:-8].abs().mean() < 0.03
        assert 2 * (found - wanted).abs().mean() < (found - wanted.flip(1)).abs().mean()


def test_facenet_sees_the_crops_also_with_a_cache(files):
    torch.manual_seed(0)
    path = files[2] / "facenet.safetensors"
    save_file(InceptionResnetV1(pretrained=None).state_dict(), path)
    settings = {"weight": 1.0, "recogniser": "facenet", "path": str(path)}
    case = Case(files, **settings)
    make_cache(case.config, progress=False)
    cached = Case(files, cached=True, **settings)
    assert cached.batch.pixels is None and torch.equal(cached.batch.crops, case.batch.crops)
    loss, record, _ = case.run()
    other_loss, other_record, _ = cached.run()
    torch.testing.assert_close(record.values["identity/likeness"], other_record.values["identity/likeness"])
    assert loss.item() == pytest.approx(other_loss.item(), rel=1e-4)


def test_another_network_is_no_facenet(files):
    path = files[2] / "other.safetensors"
    save_file({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(TrainerError, match="loss.identity.path: .*other.safetensors.*InceptionResnetV1.*missing"):
        Case(files, weight=1.0, recogniser="facenet", path=str(path))


@pytest.mark.parametrize("found", [{"recogniser": "facenet"}, {"path": "a.pt"}])
def test_facenet_needs_its_weights_and_the_encoder_none(files, found):
    with pytest.raises(TrainerError, match="loss.identity.path is .* facenet needs a file of weights"):
        Case(files, weight=1.0, **found)
