"""The promises of FeedFace Apply Adapter about numbers, against ComfyUI's own sampling."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.small_model import apply, build_model, sample


def face_of(pack, adapter, crops, **options):
    return pack.face.EncodeFaces.execute(adapter, crops, **options).args[0]


def assert_same(found, expected, error=1e-5):
    """Equal but for rounding: relative to the size of the whole latent."""
    assert (found - expected).norm() <= error * expected.norm()


def test_face_changes_the_picture(pack, model, adapter, face, other_face):
    plain, faced = sample(model), sample(apply(pack, model, adapter, face))
    assert (plain - faced).abs().max() > 0.05
    assert (sample(apply(pack, model, adapter, other_face)) - faced).abs().max() > 1e-3


# Bit-identical to the unpatched model.


def test_fresh_adapter_changes_nothing(pack, model, make_adapter, crops):
    fresh = make_adapter(zero=True)
    assert torch.equal(sample(apply(pack, model, fresh, face_of(pack, fresh, crops))), sample(model))


@pytest.mark.parametrize(
    "options",
    [{"strength": 0.0}, {"face": None}, {"mask": torch.zeros(1, 16, 16)}, {"start": 1.0}, {"end": 0.0}],
    ids=["strength 0", "no face", "mask of zeros", "starts at the end", "ends at the start"],
)
def test_off_is_the_unpatched_model(pack, model, adapter, face, options):
    assert torch.equal(sample(apply(pack, model, adapter, **{"face": face, **options})), sample(model))


def test_face_with_every_weight_zero_is_no_face(pack, model, adapter, crops):
    nobody = face_of(pack, adapter, crops[:2], weights="0, 0")
    assert torch.equal(sample(apply(pack, model, adapter, nobody)), sample(model))


def test_steps_outside_the_range_are_untouched(pack, model, adapter, face):
    """With a face from the middle on, the first of two steps is that of the unpatched model."""
    late = apply(pack, model, adapter, face, start=0.5)
    assert torch.equal(sample(late, steps=2, last_step=1), sample(model, steps=2, last_step=1))
    assert not torch.equal(sample(late, steps=4), sample(model, steps=4))
    early = apply(pack, model, adapter, face, end=0.5)
    assert not torch.equal(sample(early, steps=2, last_step=1), sample(model, steps=2, last_step=1))


def test_unpatched_model_after_a_patched_run(pack, model, adapter, face):
    before = sample(model)
    sample(apply(pack, model, adapter, face))
    assert torch.equal(sample(model), before)


def test_negative_row_is_untouched(pack, model, adapter, face):
    """At cfg 0 only the negative prediction counts, and it carries no face."""
    assert torch.equal(sample(apply(pack, model, adapter, face), cfg=0.0), sample(model, cfg=0.0))


# Equal to 1e-5.


def test_mask_of_ones_equals_no_mask(pack, model, adapter, face):
    masked = sample(apply(pack, model, adapter, face, mask=torch.ones(1, 128, 128)))
    assert_same(masked, sample(apply(pack, model, adapter, face)))


@pytest.mark.parametrize("combination", ["concat", "average", "weighted_average"])
def test_the_same_reference_twice_changes_nothing(pack, model, adapter, crops, combination):
    once = sample(apply(pack, model, adapter, face_of(pack, adapter, crops[:1], combination=combination)))
    twice = face_of(pack, adapter, crops[[0, 0]], combination=combination)
    assert_same(sample(apply(pack, model, adapter, twice)), once)


@pytest.mark.parametrize("combination", ["concat", "average", "weighted_average"])
def test_weight_zero_leaves_the_reference_out(pack, model, adapter, crops, combination):
    alone = face_of(pack, adapter, crops[:1], combination=combination)
    ignored = face_of(pack, adapter, crops[:2], weights="1, 0", combination=combination)
    assert_same(sample(apply(pack, model, adapter, ignored)), sample(apply(pack, model, adapter, alone)))


def test_weights_of_concatenated_references_act_as_counts(pack, model, adapter, crops):
    """A bias of log 2 on the logits is the same as the reference being there twice."""
    double = face_of(pack, adapter, crops[:2], weights="2, 1")
    repeated = face_of(pack, adapter, crops[[0, 0, 1]])
    found = sample(apply(pack, model, adapter, double))
    assert_same(found, sample(apply(pack, model, adapter, repeated)))
    equal = sample(apply(pack, model, adapter, face_of(pack, adapter, crops[:2])))
    assert (found - equal).norm() > 1e-4 * equal.norm()


def test_strength_acts_between_off_and_full(pack, model, adapter, face):
    plain = sample(model, steps=1)
    half, full = (sample(apply(pack, model, adapter, face, strength=s), steps=1) - plain for s in (0.05, 0.1))
    assert_same(half * 2, full, 0.2)
    assert full.abs().max() > 1e-3


# Nothing stays behind.


def test_patches_do_not_pile_up(pack, model, adapter, face):
    """Applied again with another weight from the same model, the first application is gone."""
    strong, weak = apply(pack, model, adapter, face, 1.0), apply(pack, model, adapter, face, 0.3)
    first = sample(weak)
    sample(strong)
    assert torch.equal(sample(weak), first)
    assert torch.equal(sample(apply(pack, model, adapter, face, 0.3)), first)


def test_twenty_runs_give_one_picture_and_no_growth(pack, model, adapter, face):
    patched = apply(pack, model, adapter, face)
    first = sample(patched, steps=1)
    gc.collect()
    before = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    for _ in range(20):
        assert torch.equal(sample(patched, steps=1), first)
        sample(apply(pack, model, adapter, face, 0.5), steps=1)
    gc.collect()
    assert sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) <= before + 2


def test_keys_and_values_live_no_longer_than_the_run(pack, model, adapter, face, monkeypatch):
    alive = weakref.WeakSet()
    original = pack.core_adapter.FaceAdapter.control
    monkeypatch.setattr(
        pack.core_adapter.FaceAdapter,
        "control",
        lambda self, *args, **kwargs: (made := original(self, *args, **kwargs), alive.add(made))[0],
    )
    made = []
    sample(apply(pack, model, adapter, face), callback=lambda *_: made.append(len(alive)))
    gc.collect()
    assert made[0] == 1 and len(alive) == 0


def test_keys_and_values_are_projected_once_a_run(pack, model, adapter, face, monkeypatch):
    calls = []
    branch = type(adapter.patcher(torch.float32).model.branches[0])
    original = branch.project_face
    monkeypatch.setattr(branch, "project_face", lambda self, tokens: (calls.append(self), original(self, tokens))[1])
    sample(apply(pack, model, adapter, face), steps=5)
    assert len(calls) == len(adapter.config.sites) == len(set(calls))


def test_interrupting_leaves_nothing_behind(pack, model, adapter, face):
    patched = apply(pack, model, adapter, face)
    plain, faced = sample(model), sample(patched)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        sample(patched, callback=stop)
    assert torch.equal(sample(model), plain)
    assert torch.equal(sample(patched), faced)


def test_apply_leaves_its_input_alone(pack, model, adapter, face):
    objects, options = dict(model.object_patches), str(model.model_options)
    apply(pack, model, adapter, face)
    assert model.object_patches == objects and str(model.model_options) == options and not model.additional_models


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_follows_the_type_of_the_model(pack, adapter, face, dtype):
    reference = sample(apply(pack, build_model(), adapter, face), steps=1, cfg=1.0)
    patched = apply(pack, build_model(dtype), adapter, face)
    assert adapter.patcher(dtype).model.projection.weight.dtype == dtype
    out = sample(patched, steps=1, cfg=1.0)
    assert torch.isfinite(out).all()
    assert (out - reference).norm() / reference.norm() < 0.05


def test_adapter_is_an_additional_model_of_the_patched_one(pack, model, adapter, face):
    """ComfyUI loads, unloads and partly offloads it with the model; here all its weights are cast on the fly."""
    import comfy.model_management

    patched = apply(pack, model, adapter, face)
    expected = sample(patched)
    patcher = adapter.patcher(torch.float32)
    assert patcher.model in [nested.model for nested in patched.get_nested_additional_models()]
    comfy.model_management.unload_all_models()
    patcher.load(patcher.load_device, lowvram_model_memory=1)
    assert any(getattr(module, "comfy_cast_weights", False) for module in patcher.model.modules())
    assert torch.equal(sample(patched), expected)
