"""The losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.training.losses import identity_losses, min_snr_weights, sample_losses, weighted_error


@pytest.fixture
def quarter():
    """Prediction 0, target 2 everywhere (C = 3, 4 × 4 cells); the mask covers a quarter of the cells."""
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :2] = 1.0
    return torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 2.0), mask


def test_area_and_average(quarter):
    prediction, target, mask = quarter
    assert weighted_error(prediction, target, mask, "area").item() == pytest.approx(4.0, rel=1e-6)
    assert weighted_error(prediction, target, mask, "average").item() == pytest.approx(1.0)  # 4 × 12 / 48


@pytest.mark.parametrize("normalise", ["area", "average"])
def test_values_of_no_importance_are_as_if_they_were_not_there(normalise):
    generator = torch.Generator().manual_seed(0)
    prediction, target, original = (torch.randn(3, 4, 6, 4, generator=generator) for _ in range(3))
    mask = torch.rand(3, 1, 6, 4, generator=generator)
    importance = torch.ones(1, 1, 6, 1)
    importance[:, :, 4:] = 0.0
    kinds = ["regularised", "standard", "mask"]
    found = sample_losses(prediction, target, mask, kinds, original[:1], normalise, importance)
    smaller = (tensor[:, :, :4] for tensor in (prediction, target, mask))
    expected = sample_losses(*smaller, kinds, original[:1, :, :4], normalise)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    same = sample_losses(prediction, target, mask, kinds, original[:1], normalise, torch.ones(1))
    torch.testing.assert_close(same, sample_losses(prediction, target, mask, kinds, original[:1], normalise))


def test_importance_is_a_factor_of_error_and_area():
    target = torch.tensor([[[[1.0, 3.0]]]])  # d² = 1, 9
    importance = torch.tensor([[[[1.0, 0.25]]]])
    for normalise in ("area", "average"):
        found = weighted_error(torch.zeros_like(target), target, torch.ones(1), normalise, importance).item()
        assert found == pytest.approx((1.0 + 0.25 * 9.0) / 1.25, rel=1e-5)


def test_soft_mask():
    target = torch.tensor([[[[1.0, 3.0]]]])  # d² = 1, 9
    mask = torch.tensor([[[[1.0, 0.5]]]])
    found = weighted_error(torch.zeros_like(target), target, mask, "area").item()
    assert found == pytest.approx((1.0 + 4.5) / 1.5, rel=1e-5)


@pytest.mark.parametrize("normalise, expected", [("area", 4.0 + 1.0), ("average", 1.0 + 0.75)])
def test_regularised_adds_the_distance_to_the_frozen_model_outside_the_mask(quarter, normalise, expected):
    prediction, target, mask = quarter
    original = torch.full_like(prediction, -1.0)  # d'² = 1 on the other 12 of 16 cells
    loss = sample_losses(prediction, target, mask, ["regularised"], original, normalise)
    assert loss.tolist() == pytest.approx([expected], rel=1e-5)


def test_kinds_are_each_samples_own(quarter):
    prediction, target, mask = (tensor.repeat(4, 1, 1, 1) for tensor in quarter)
    target[:, :, 2:] = 0.0  # nothing to learn in the lower half, so that the kinds differ
    kinds = ["regularised", "standard", "mask", "regularised"]
    original = torch.stack([torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 3.0)])
    losses = sample_losses(prediction, target, mask, kinds, original)
    assert losses.tolist() == pytest.approx([4.0 + 1.0, 2.0, 4.0, 4.0 + 9.0], rel=1e-5)


def test_all_one_mask_is_the_standard_loss_and_all_zero_the_prior_alone():
    generator = torch.Generator().manual_seed(0)
    prediction, target, original = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    mask = torch.stack([torch.ones(1, 8, 8), torch.zeros(1, 8, 8)])
    losses = sample_losses(prediction, target, mask, ["regularised"] * 2, original)
    assert losses[0].item() == pytest.approx((target - prediction)[0].square().mean().item(), rel=1e-5)
    assert losses[1].item() == pytest.approx((original - prediction)[1].square().mean().item(), rel=1e-5)
    assert sample_losses(prediction, target, mask, ["mask"] * 2).tolist()[1] == 0.0


def test_a_small_face_counts_as_much_as_a_large_one(quarter):
    prediction, target, mask = quarter
    large = sample_losses(prediction, target, torch.ones_like(mask), ["mask"])
    assert sample_losses(prediction, target, mask, ["mask"]).item() == pytest.approx(large.item(), rel=1e-5)


def test_gradient_reaches_only_the_mask(quarter):
    prediction, target, mask = quarter
    prediction.requires_grad_(True)
    sample_losses(prediction, target, mask, ["mask"]).sum().backward()
    assert prediction.grad[..., :2, :2].abs().min() > 0
    assert prediction.grad[..., 2:, :].abs().max() == 0


def test_numbers_that_do_not_fit_are_refused(quarter):
    prediction, target, mask = quarter
    with pytest.raises(ValueError, match="2 kinds of loss for 1 samples"):
        sample_losses(prediction, target, mask, ["mask", "mask"])
    with pytest.raises(ValueError, match="0 predictions of the frozen model for 1 regularised"):
        sample_losses(prediction, target, mask, ["regularised"])


def test_min_snr():
    snr = torch.tensor([0.5, 5.0, 20.0])
    assert min_snr_weights(snr, 5.0, "epsilon").tolist() == pytest.approx([1.0, 1.0, 0.25])
    assert min_snr_weights(snr, 5.0, "v").tolist() == pytest.approx([0.5 / 1.5, 5.0 / 6.0, 5.0 / 21.0])


def test_identity():
    """Two faces at 0° and 90°; the first one's references at 60°, the second one's at 90°, a third person's at 0°."""
    found = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    references = torch.tensor([[0.5, 3**0.5 / 2], [0.0, 1.0], [1.0, 0.0]])
    away, contrast = identity_losses(found, references, [0, 1], [[1, 2], []], temperature=0.5)
    assert away.tolist() == pytest.approx([0.5, 0.0], abs=1e-6)
    own, other, third = math.exp(0.5 / 0.5), math.exp(0.0), math.exp(1.0 / 0.5)
    assert contrast.tolist() == pytest.approx([-math.log(own / (own + other + third)), 0.0], abs=1e-6)
    (away + contrast).sum().backward()
    assert torch.equal(found.grad[1], -references[1])  # nobody else: the likeness alone
    slopes = []
    for shift in (1e-3, -1e-3):
        moved = identity_losses(torch.tensor([[1.0 + shift, 0.0]]), references, [0], [[1, 2]], temperature=0.5)
        slopes.append(sum(moved).item())
    assert found.grad[0, 0].item() == pytest.approx((slopes[0] - slopes[1]) / 2e-3, rel=1e-2)
