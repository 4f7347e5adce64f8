"""FeedFace Schedule: what a strength that changes over the steps and the blocks does to a picture."""

from __future__ import annotations

import pytest
import torch
from support.small_model import apply, build_model, sample


@pytest.fixture(scope="module")
def make(comfy):
    node = comfy.module("nodes.schedule").StrengthSchedule

    def schedule(curve="linear", first=0.0, last=1.0, points="", sites=""):
        return node.execute(curve, first, last, points, sites).args[0]

    return schedule


@pytest.fixture
def scheduled(pack, model, adapter, face, make):
    """The model with a face and a schedule."""

    def patched(strength=1.0, model=model, face=face, adapter=adapter, start=0.0, end=1.0, **values):
        execute = pack.apply.ApplyFeedFace.execute
        return execute(model, adapter, strength, start, end, face, schedule=make(**values)).args[0]

    return patched


def close(one, other, error=1e-5):
    return bool((one - other).norm() <= error * other.norm())


@pytest.mark.parametrize(
    "values",
    [
        {"curve": "constant", "first": 0.0},
        {"first": 0.0, "last": 0.0},
        {"points": "0:0, 1:0"},
        {"curve": "constant", "first": 1.0, "sites": "*: 0"},
        {"sites": "in: 0, mid: 0, out: 0"},
    ],
)
def test_zeros_are_the_unpatched_model(model, scheduled, values, caplog):
    assert torch.equal(sample(scheduled(**values)), sample(model))
    assert "did not reach the picture" not in caplog.text


@pytest.mark.parametrize(
    "values",
    [{"curve": "constant", "first": 1.0}, {"points": "0:1, 1:1"}, {"first": 1.0, "last": 1.0, "sites": "in:1"}],
)
def test_constant_one_is_no_schedule(pack, model, adapter, face, scheduled, values):
    assert torch.equal(sample(scheduled(**values)), sample(apply(pack, model, adapter, face)))


def test_constant_is_a_strength(pack, model, adapter, face, scheduled):
    half = sample(apply(pack, model, adapter, face, 0.5))
    assert close(sample(scheduled(curve="constant", first=0.5)), half)
    assert close(sample(scheduled(points="0:0.50001, 1:0.5")), half, 1e-4)
    assert close(sample(scheduled(strength=2.0, curve="constant", first=0.25)), half)


def test_steps_at_zero_do_not_run(pack, model, adapter, face, scheduled):
    """From the middle on is what the widget ``start`` does, and the first of two steps is untouched."""
    late = scheduled(points="0:0, 0.5:0, 0.5:1")
    assert torch.equal(sample(late, steps=2, last_step=1), sample(model, steps=2, last_step=1))
    assert close(sample(late, steps=4), sample(apply(pack, model, adapter, face, start=0.5), steps=4))
    early = scheduled(points="0:1, 0.5:1, 0.5:0")
    assert close(sample(early, steps=4), sample(apply(pack, model, adapter, face, end=0.5), steps=4), 1e-4)


def test_a_curve_differs_from_its_ends(model, scheduled):
    whole, none = sample(scheduled(curve="constant", first=1.0), steps=4), sample(model, steps=4)
    pictures = [sample(scheduled(curve=curve, first=0.0, last=1.0), steps=4) for curve in ("linear", "ease", "peak")]
    for picture in pictures:
        assert not close(picture, whole, 1e-3) and not close(picture, none, 1e-3)
    assert not close(pictures[0], pictures[2], 1e-3)


def test_the_factor_follows_the_noise_levels(pack, comfy, model):
    """The shares of a run of equal steps, read off the noise levels, rise equally."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 10)[:-1]
    shares = [pack.patches.share_of_run(sampling, float(sigma)) for sigma in sigmas]
    assert shares == pytest.approx([number / 10 for number in range(10)], abs=0.01)
    for share in (0.1, 0.5, 0.9):
        sigma = float(sampling.percent_to_sigma(share))
        assert pack.patches.share_of_run(sampling, sigma) == pytest.approx(share, abs=1e-5)


def test_blocks_have_their_own_factor(pack, comfy, model, adapter, face, scheduled, make_adapter):
    """A block switched off is an adapter without that branch."""
    names = [site.name for site in adapter.config.sites]
    kept = [name for name in names if not name.startswith("in")]
    assert 0 < len(kept) < len(names)
    without = sample(scheduled(curve="constant", first=1.0, sites="in: 0"))
    module = adapter.patcher(torch.float32).model
    weights = {name: module.branches[names.index(name)].zero_linear.weight for name in names}
    saved = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name in set(names) - set(kept):
            weights[name].data.zero_()
        assert close(without, sample(apply(pack, model, adapter, face)))
    finally:
        for name, weight in saved.items():
            weights[name].data.copy_(weight)
    assert not close(without, sample(apply(pack, model, adapter, face)), 1e-3)
    halved = sample(scheduled(curve="constant", first=1.0, sites="*: 0.5"))
    assert close(halved, sample(apply(pack, model, adapter, face, 0.5)))
    error = comfy.module("feedface_core.errors").FeedFaceError
    with pytest.raises(error, match=r"FeedFace Apply Adapter: sites: no block of the adapter begins with 'down'"):
        scheduled(sites="down: 0.5")


def test_no_face_stays_no_face(pack, model, adapter, make):
    patched = pack.apply.ApplyFeedFace.execute(model, adapter, 1.0, 0.0, 1.0, schedule=make()).args[0]
    assert torch.equal(sample(patched), sample(model))


def test_what_is_no_schedule_is_refused(pack, comfy, model, adapter, face, make):
    error = comfy.module("feedface_core.errors").FeedFaceError
    with pytest.raises(error, match="FeedFace Apply Adapter: schedule is 'x', expected what an output FEEDFACE_SCHED"):
        pack.apply.ApplyFeedFace.execute(model, adapter, 1.0, 0.0, 1.0, face, schedule="x")
    with pytest.raises(error, match="FeedFace Schedule: points: found '1'"):
        make(points="1")


def test_a_strength_that_changes_is_one_graph(pack, comfy, make_adapter, make, crops):
    """Compiled: neither the steps of a curve nor another curve make another graph."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.testing import CompileCounter

    model = build_model(channel_mult=[1], num_res_blocks=[1], transformer_depth=[1], transformer_depth_output=[1, 1])
    adapter = make_adapter(sites=pack.sd_unet.default_sites(model.get_model_object("diffusion_model")))
    face = pack.face.EncodeFaces.execute(adapter, crops[:1]).args[0]
    counter = CompileCounter()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for first in (0.2, 0.5):
            execute = pack.apply.ApplyFeedFace.execute
            patched = execute(model, adapter, 1.0, 0.0, 1.0, face, schedule=make(first=first)).args[0]
            compiled = patched.clone()
            set_torch_compile_wrapper(compiled, backend=counter)
            assert close(sample(compiled, steps=4), sample(patched, steps=4))
    assert counter.frame_count == 1
    torch._dynamo.reset()
