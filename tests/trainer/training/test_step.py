"""One training step against the same thing written out sample by sample."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.small_training import make_config, make_models, make_photos
from torch.nn.attention import SDPBackend, sdpa_kernel

from feedface_core.conditioning import Face
from trainer.data.batch import collate
from trainer.data.dataset import FaceDataset, TensorShapes
from trainer.data.manifest import read_manifest
from trainer.models.adapter import load_models
from trainer.training.step import AdapterStep, Plan, encode_batch


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("step")
    return make_models(root / "models"), make_photos(root / "photos"), root


class Case:
    """Parts, a batch of six samples with decisions set by hand, and the step."""

    def __init__(self, files, **changes):
        models, manifest, root = files
        self.config = make_config(models, manifest, root / "run", **changes)
        self.models = load_models(self.config, "cpu")
        torch.manual_seed(0)
        for branch in self.models.adapter.branches:
            torch.nn.init.normal_(branch.zero_linear.weight, std=0.2)
        records, _ = read_manifest(manifest)
        dataset = FaceDataset(records, self.config, TensorShapes.of(self.models.frozen, 64))
        batch = collate([dataset[index, 0] for index in range(6)])
        faces = [bool(count) for count in batch.reference_counts]
        self.batch = dataclasses.replace(
            batch, drop_face=[not face for face in faces], standard_loss=[False, True, False, False, True, False]
        )
        self.features = encode_batch(self.batch, self.models.frozen, self.models.encoder)
        self.step = AdapterStep(self.models, self.config.loss, self.config.adapter.combination)

    def gradients(self):
        loss, record = self.step(self.batch)
        self.models.adapter.zero_grad()
        loss.backward()
        named = self.models.adapter.named_parameters()
        return loss.detach(), record.losses, {name: value.grad for name, value in named}


def written_out(case: Case) -> torch.Tensor:
    """The mean loss with a forward pass of its own for each sample, twice where the loss needs the frozen model."""
    batch, features, base, adapter = case.batch, case.features, case.models.frozen, case.models.adapter
    total, place = torch.zeros(()), 0
    for row in range(len(batch)):
        count = batch.reference_counts[row]
        hidden = features.hidden[place : place + count]
        place += count
        one = slice(row, row + 1)
        timesteps, text = batch.timesteps[one], {name: value[one] for name, value in features.text.items()}
        alpha = base.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * features.latents[one] + (1 - alpha).sqrt() * batch.noise[one]
        target = batch.noise[one]
        if base.prediction == "v":
            target = alpha.sqrt() * batch.noise[one] - (1 - alpha).sqrt() * features.latents[one]
        if count:
            control = adapter.control_of(Face(hidden), "cpu", torch.float32)
        else:
            control = adapter.null_control("cpu", torch.float32)
        prediction = base.predict(noisy, timesteps, text, [(1, control)])
        d = (target - prediction).square()
        if batch.standard_loss[row]:
            loss = d.mean()
        else:
            mask = batch.masks[one]
            with torch.no_grad():
                original = base.predict(noisy, timesteps, text)
            outside = (original - prediction).square()
            loss = (d * mask).sum() / (4 * mask.sum()) + (outside * (1 - mask)).sum() / (4 * (1 - mask).sum())
        if control is not None:  # without branches there is nothing to train
            total = total + loss / len(batch)
    return total


@pytest.mark.parametrize("null", ["off", "learned", "zero_crop"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_step_is_the_written_out_one(files, null, prediction):
    case = Case(files, adapter__null=null, loss__face_dropout=0.4, model__prediction=prediction)
    assert 0 < sum(case.batch.drop_face) < 6
    assert len({count for count in case.batch.reference_counts if count}) > 1, "references of different numbers"
    loss, losses, gradients = case.gradients()
    case.models.adapter.zero_grad()
    expected = written_out(case)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(losses) == (6 if null != "off" else 6 - sum(case.batch.drop_face))
    for name, parameter in case.models.adapter.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_base_takes_no_gradient(files):
    case = Case(files)
    case.gradients()
    modules = [*case.models.frozen.modules.values(), case.models.encoder.module]
    frozen = [value for module in modules for value in module.parameters()]
    assert len(modules) == 4
    assert frozen and all(value.grad is None and not value.requires_grad for value in frozen)
    assert all(value.grad is not None for value in case.models.adapter.parameters())


def test_frozen_prediction_only_where_the_loss_needs_it(files, monkeypatch):
    case = Case(files, loss__face_dropout=0.4)
    calls = []
    predict = case.models.frozen.predict

    def counting(noisy, timesteps, text, rows=None):
        calls.append((len(noisy), rows is not None, torch.is_grad_enabled()))
        return predict(noisy, timesteps, text, rows)

    monkeypatch.setattr(case.models.frozen, "predict", counting)
    case.gradients()
    batch = case.batch
    with_face = [row for row in range(6) if not batch.drop_face[row]]
    needing = [row for row in with_face if not batch.standard_loss[row]]
    assert calls == [(len(needing), False, False), (len(with_face), True, True)]
    calls.clear()
    case.batch = dataclasses.replace(case.batch, standard_loss=[True] * 6)
    case.gradients()
    assert calls == [(len(with_face), True, True)]
    calls.clear()
    case.batch = dataclasses.replace(case.batch, drop_face=[True] * 6)
    loss, losses, gradients = case.gradients()
    assert calls == [] and loss.item() == 0.0 and len(losses) == 0
    assert all(value.abs().max() == 0 for value in gradients.values())


@pytest.mark.parametrize("null", ["off", "learned"])
def test_gradient_checkpointing_changes_nothing(files, null):
    plain = Case(files, adapter__null=null, loss__face_dropout=0.4)
    saving = Case(files, adapter__null=null, loss__face_dropout=0.4, model__gradient_checkpointing=True)
    loss, _, gradients = plain.gradients()
    other_loss, _, other = saving.gradients()
    assert torch.equal(loss, other_loss)
    for name, value in gradients.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-7)


def test_bf16_is_close_to_fp32(files):
    exact = Case(files)
    half = Case(files, model__precision="bf16")
    loss, *_ = exact.gradients()
    with torch.autocast("cpu", torch.bfloat16):
        other, *_ = half.gradients()
    assert other.item() == pytest.approx(loss.item(), rel=0.03)
    assert all(value.dtype == torch.float32 for value in half.models.adapter.parameters())


@pytest.mark.parametrize("null", ["off", "zero_crop"])
def test_bf16_narrows_no_frozen_encoder(files, null):
    exact, half = Case(files, adapter__null=null), Case(files, adapter__null=null, model__precision="bf16")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = encode_batch(half.batch, half.models.frozen, half.models.encoder)
            again = half.models.encoder.null_hidden()
        assert torch.equal(features.latents, exact.features.latents)
        assert torch.equal(features.text["states"], exact.features.text["states"])
        assert torch.equal(features.hidden, exact.features.hidden)
        assert torch.equal(again, exact.models.encoder.null_hidden())
    if null == "zero_crop":
        assert torch.equal(half.models.adapter.null_hidden, exact.models.adapter.null_hidden)


def test_min_snr_weighs_the_gradient(files):
    plain, weighted = Case(files), Case(files, loss__min_snr_gamma=1.0)
    _, losses, _ = plain.gradients()
    loss, other, _ = weighted.gradients()
    alpha = plain.models.frozen.scheduler.alphas_cumprod[plain.batch.timesteps[~torch.tensor(plain.batch.drop_face)]]
    snr = alpha / (1 - alpha)
    expected = (losses * snr.clamp(max=1.0) / snr).sum() / 6
    assert torch.allclose(losses, other) and loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_plan():
    plan = Plan.of([False, True, False, True], [False, False, True, True], "regularised", "learned")
    assert plan == Plan((0, 2, 1, 3), 2, ("regularised", "standard", "regularised", "standard"), (0, 2))
    assert Plan.of([False, True], [False, False], "regularised", "off").rows == (0,)
    assert Plan.of([True], [False], "mask", "off") == Plan((), 0, (), ())


def test_plain_attention_gives_the_same(files):
    case = Case(files)
    loss, _, gradients = case.gradients()
    with sdpa_kernel(SDPBackend.MATH):
        other_loss, _, other = Case(files).gradients()
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, value in gradients.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5, msg=name)
