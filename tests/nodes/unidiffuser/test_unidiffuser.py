"""UniDiffuser as a MODEL of ComfyUI, against the numbers of the released implementation and against a plain loop."""

from __future__ import annotations

import pytest
import torch
from support.unidiffuser import GOLDEN, TOLERANCE, direct, faced, relative, released_encoder, sample, text
from torch import Tensor

# One evaluation, through everything ComfyUI puts between a sampler and a model.


def one_step(uni, model, golden, row: int) -> tuple[Tensor, Tensor]:
    """Noise predictions (picture, token) of the MODEL for one row of the golden input, by ComfyUI's sampling path."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sigma = sampling.sigmas[int(golden["in.t_img"][row]) - 1]
    found = {}

    class OneEvaluation(comfy.samplers.Sampler):
        def sample(
            self,
            model_wrap,
            sigmas,
            extra_args,
            callback,
            noise,
            latent_image=None,
            denoise_mask=None,
            disable_pbar=False,
        ):
            # What the network is given is the state divided by √(σ² + 1).
            state = uni.joint.pack(golden["in.latent"][row : row + 1], golden["in.clip_img"][row : row + 1])
            state = state * (sigma**2 + 1) ** 0.5
            denoised = model_wrap(state, sigma[None], model_options=extra_args["model_options"], seed=0)
            found["noise"] = (state - denoised) / sigma
            return noise

    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        comfy.samplers.sample(
            model,
            noise,
            text(golden, row),
            text(golden, row),
            1.0,
            model.load_device,
            OneEvaluation(),
            torch.tensor([float(sampling.sigma_max), 0.0]),
            latent_image=torch.zeros_like(noise),
            seed=1,
        )
    return uni.joint.unpack(found["noise"], 4, 512)


@pytest.mark.parametrize("row", [0, 1])
def test_plain_step(uni, model, golden, row):
    picture, token = one_step(uni, model, golden, row)
    assert relative(picture, golden["out.plain_img"][row : row + 1]) < TOLERANCE
    assert relative(token, golden["out.plain_clip"][row : row + 1]) < TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("combination", ["concat", "mean", "first"])
def test_step_with_faces(uni, model, adapter, golden, combination, strength):
    references = 1 if combination == "first" else 2
    patched = faced(uni, model, adapter, golden, references, "average" if combination == "mean" else "concat", strength)
    for row in (0, 1):
        picture, token = one_step(uni, patched, golden, row)
        name = f"out.{combination}_{strength}"
        assert relative(picture, golden[f"{name}_img"][row : row + 1]) < TOLERANCE
        assert relative(token, golden[f"{name}_clip"][row : row + 1]) < TOLERANCE


def test_text_of_noise_has_the_last_time(uni, model, golden):
    """The golden number has the given text at time 1000; the node draws its own, so the two are put together here."""
    original = model.model.extra_conds

    def at_last_time(**kwargs):
        out = original(**kwargs)
        unconditional = original(**kwargs, **uni.nodes.UnconditionalText.execute(3).args[0][0][1])
        assert unconditional["c_crossattn"].cond.shape == (1, 77, 64)
        assert unconditional["c_crossattn"].cond.std() == pytest.approx(1.0, abs=0.03)
        return {**out, "text_time": unconditional["text_time"]}

    patched = model.clone()
    patched.add_object_patch("extra_conds", at_last_time)
    for row in (0, 1):
        picture, _ = one_step(uni, patched, golden, row)
        assert relative(picture, golden["out.plain_img_text_time_1000"][row : row + 1]) < TOLERANCE
        assert relative(picture, golden["out.plain_img"][row : row + 1]) > 0.005


# Whole runs.


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (13, 9)], ids=str)
def test_ksampler_equals_a_direct_loop(uni, model, golden, prompts, size):
    ours = sample(model, *prompts, size=size, steps=4)
    assert relative(ours, direct(uni, golden, 4, 3.0, size=size)) < TOLERANCE
    assert ours.shape == (1, 4, *size)


@pytest.mark.parametrize("references", [2, 5])
def test_ksampler_with_faces_equals_a_direct_loop(uni, model, adapter, golden, prompts, references):
    crops = torch.rand(references, 3, 224, 224, generator=torch.Generator().manual_seed(7)) * 2 - 1
    vision = uni.encoder.build_encoder(adapter.config.encoder, released_encoder(uni))
    face = uni.conditioning.Face(uni.encoder.encode_pixels(vision, adapter.config.encoder, crops))
    patched = uni.apply.ApplyFeedFace.execute(model, adapter, 0.8, 0.0, 1.0, face).args[0]
    ours = sample(patched, *prompts, size=(20, 16), steps=4)
    built = adapter.patcher(torch.float32).model
    assert relative(ours, direct(uni, golden, 4, 3.0, size=(20, 16), face=(built, face, 0.8))) < TOLERANCE
    assert relative(ours, sample(model, *prompts, size=(20, 16), steps=4)) > 0.01


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "euler_ancestral", "uni_pc", "ddim", "dpm_adaptive"])
def test_other_samplers(model, prompts, sampler):
    result = sample(model, *prompts, sampler=sampler, steps=4)
    assert result.shape == (1, 4, 16, 16) and torch.isfinite(result).all()
    assert torch.equal(result, sample(model, *prompts, sampler=sampler, steps=4))


def test_guided_by_a_custom_guider(uni, model, prompts):
    """SamplerCustomAdvanced's way: a guider samples; previews show pictures of four channels."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*prompts)
    guider.set_cfg(3.0)
    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(5))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    seen = []
    with torch.no_grad():
        result = guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            sigmas,
            seed=5,
            callback=lambda step, x0, x, total: seen.append((step, x0.shape, x.shape, total)),
        )
    assert torch.equal(result.float(), sample(model, *prompts))
    assert seen == [(step, (1, 4, 16, 16), (1, 4, 16, 16), 3) for step in range(3)]


@pytest.mark.parametrize("form", ["text, then face", "three weights", "joint"])
def test_feedface_guider(comfy, model, prompts, form):
    """Without a face every form is a form of classifier-free guidance."""
    make_guider = comfy.module("nodes.guider").make_guider
    guider = make_guider(model, *prompts, *((2.0, 1.0, 0.0) if form == "joint" else (3.0, 3.0, 0.0)), form)
    assert relative(guided(guider, model), sample(model, *prompts)) < TOLERANCE


def test_unconditional_text_keeps_its_time_under_the_guider(comfy, uni, model, adapter, golden, prompts):
    """ε(∅,f) alone is the picture of the face and a text of noise."""
    negative = uni.nodes.UnconditionalText.execute(4).args[0]
    patched = faced(uni, model, adapter, golden, 1)
    guider = comfy.module("nodes.guider").make_guider(patched, prompts[0], negative, 0.0, 1.0, 0.0, "face, then text")
    assert guider.weights.needed == ("face",)
    alone = sample(patched, negative, negative, cfg=1.0)
    assert relative(guided(guider, patched), alone) < TOLERANCE
    assert relative(alone, sample(model, negative, negative, cfg=1.0)) > 0.01


def guided(guider, model) -> Tensor:
    import comfy.samplers

    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(5))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    with torch.no_grad():
        return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=5)


def test_adapter_off_is_bit_identical(uni, model, adapter, golden, prompts):
    plain = sample(model, *prompts)
    assert torch.equal(sample(faced(uni, model, adapter, golden, 2, strength=0.0), *prompts), plain)
    assert not torch.equal(sample(faced(uni, model, adapter, golden, 2), *prompts), plain)
    assert torch.equal(sample(model, *prompts), plain)


def test_rows_of_a_batch_are_the_pictures_alone(model, prompts):
    """The token of a row depends on its own noise, not on its place in the batch."""
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    together = sample(model, *prompts, batch=3, noise=noise)
    for row in range(3):
        alone = sample(model, *prompts, noise=noise[row : row + 1])
        assert relative(together[row : row + 1], alone) < TOLERANCE


def test_two_stages_equal_one(model, prompts):
    """The token survives a run that stops halfway, although the latent between the two has no place for it."""
    whole = sample(model, *prompts, steps=6)
    half = sample(model, *prompts, steps=6, last_step=3)
    rest = sample(model, *prompts, steps=6, start_step=3, latent=half, noise=torch.zeros_like(half))
    assert relative(rest, whole) < TOLERANCE
    # In half precision between the two.
    halved = half.half().float()
    rest = sample(model, *prompts, steps=6, start_step=3, latent=halved, noise=torch.zeros_like(half))
    assert relative(rest, whole) < 5e-3


def test_an_unfinished_latent_is_an_ordinary_one(model, prompts):
    """Other nodes see a tensor; a picture that was changed on the way has lost the token, and samples as one does."""
    half = sample(model, *prompts, steps=6, last_step=3)
    plain = torch.empty(half.shape).copy_(half)
    assert type(half * 2) is type(half[:1]) is type(torch.cat([half, half])) is torch.Tensor
    assert torch.equal(half, plain) and not half.is_nested
    whole = sample(model, *prompts, steps=6)
    assert type(whole) is torch.Tensor

    def rest(latent):
        return sample(model, *prompts, steps=6, start_step=3, latent=latent, noise=torch.zeros(1, 4, 16, 16))

    assert torch.equal(rest(half * 1.0), rest(plain))
    assert TOLERANCE < relative(rest(plain), whole) < 0.1


def test_a_run_does_not_depend_on_those_before(model, prompts):
    """Not on an unfinished one of another prompt that stopped at the same picture either."""
    latent = sample(model, *prompts, steps=6, last_step=3)
    plain = torch.empty(latent.shape).copy_(latent)

    def rest():
        return sample(model, *prompts, steps=6, start_step=3, latent=plain, noise=torch.zeros(1, 4, 16, 16))

    first = rest()
    sample(model, *reversed(prompts), steps=6, start_step=2, last_step=3, latent=plain, noise=torch.zeros(1, 4, 16, 16))
    sample(model, *prompts, steps=6, last_step=3)
    assert torch.equal(rest(), first)


def test_from_an_image_is_reproducible(model, prompts):
    """The same latent gives the same picture, whatever ran before; at strength 1 it is gone but for ComfyUI's share."""
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    first = sample(model, *prompts, latent=latent, denoise=0.5, steps=4)
    sample(model, *prompts)
    sample(model, *prompts, latent=latent, steps=4, last_step=1, noise=torch.zeros(1, 4, 16, 16))  # unfinished
    assert torch.equal(sample(model, *prompts, latent=latent, denoise=0.5, steps=4), first)
    strong = sample(model, *prompts, latent=latent, denoise=0.9, steps=4)
    weak = sample(model, *prompts, latent=latent, denoise=0.1, steps=4)
    assert (weak - latent).norm() < (first - latent).norm() < (strong - latent).norm()


def test_token_is_brought_to_the_level_of_the_image(uni):
    """Under a model that always sees the same clean token, the start is that token and noise of the first level."""
    target = torch.full((2, 1, 512), 3.0)
    asked = []

    def guider(state, sigma, model_options, seed):
        picture, _ = uni.joint.unpack(state, 4, 512)
        asked.append((float(sigma[0]), float(picture.std())))
        return uni.joint.pack(torch.zeros_like(picture), target)

    picture = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * 2.0
    fresh = uni.joint.row_noise(picture, 1, 512)
    token = uni.joint.JointSampler(None, 4, 512).warm_up(guider, 2.0, 14.6, {}, picture, fresh)
    assert len(asked) == uni.joint.WARM_UP_STEPS and asked[0][0] == pytest.approx(14.6, rel=1e-3)
    assert all(spread == pytest.approx(level, rel=0.1) for level, spread in asked)  # the picture holds its level
    # Pure noise holds nothing of the token yet, so its share of the noise left is missing: 3 · (1 − 2 / 14.6).
    assert token.mean() == pytest.approx(2.59, abs=0.15) and token.std() == pytest.approx(2.0, rel=0.1)


def test_inpainting_keeps_what_is_masked(model, prompts):
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    for options in ({}, {"denoise": 0.6}):
        result = sample(model, *prompts, latent=latent, noise_mask=mask, steps=4, **options)
        torch.testing.assert_close(result[..., :8], latent[..., :8], atol=1e-5, rtol=1e-5)
        assert (result[..., 8:] - latent[..., 8:]).abs().mean() > 0.1


def test_areas_and_masks(model, golden, prompts):
    """A prompt for each half: equal prompts give the whole picture's result, different ones another."""
    whole = sample(model, *prompts)
    left, right = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    left[..., :8], right[..., 8:] = 1.0, 1.0

    def halves(second: int) -> list:
        return text(golden, 0, mask=left, mask_strength=1.0) + text(golden, second, mask=right, mask_strength=1.0)

    assert relative(sample(model, halves(0), prompts[1]), whole) < TOLERANCE
    assert relative(sample(model, halves(1), prompts[1]), whole) > 1e-3
    areas = text(golden, 0, area=(16, 8, 0, 0)) + text(golden, 0, area=(16, 8, 0, 8))
    result = sample(model, areas, prompts[1])
    assert result.shape == whole.shape and torch.isfinite(result).all() and not torch.equal(result, whole)


def test_token_of_several_prompts_is_weighted(uni):
    """Two masked prompts in one list: the token is their mean by strength and covered share."""
    step = uni.joint.TokenOfStep(torch.zeros(1, 1, 512))
    options = {"cond_or_uncond": [0, 0, 1], "uuids": ["a", "b", "c"]}
    step.record(torch.tensor([1.0, 2.0, 7.0]).view(3, 1, 1).expand(3, 1, 512), options)
    quarter = torch.zeros(1, 16, 16)
    quarter[:, :8, :8] = 1.0
    conds = [{"uuid": "a", "mask": quarter}, {"uuid": "b", "strength": 0.5, "area": (16, 8, 0, 0)}]
    assert float(step.combined(0, conds, torch.Size((1, 4, 16, 16)))[0, 0, 0]) == pytest.approx(1.5)
    assert float(step.combined(1, [{"uuid": "c"}], torch.Size((1, 4, 16, 16)))[0, 0, 0]) == pytest.approx(7.0)


def test_unconditional_text_node(uni, model, prompts):
    negative = uni.nodes.UnconditionalText.execute(1).args[0]
    result = sample(model, prompts[0], negative)
    assert torch.equal(result, sample(model, prompts[0], uni.nodes.UnconditionalText.execute(1).args[0]))
    assert not torch.equal(result, sample(model, prompts[0], uni.nodes.UnconditionalText.execute(2).args[0]))
    assert not torch.equal(result, sample(model, *prompts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(uni, model, prompts, dtype):
    halved = uni.model.load_unidiffuser(GOLDEN / "uvit.pth", GOLDEN / "caption_decoder.pth", dtype)
    assert halved.model.diffusion_model.mid_block.mlp.fc1.weight.dtype == dtype
    halved.model.manual_cast_dtype = None  # compute in it as well
    result = sample(halved, *prompts)
    assert 0 < relative(result, sample(model, *prompts)) < (0.02 if dtype == torch.float16 else 0.15)


def test_weights_that_are_cast_for_each_layer(uni, model, prompts):
    """As on a device that stores in half precision and computes in single, or with --lowvram."""

    stored = uni.model.load_unidiffuser(GOLDEN / "uvit.pth", GOLDEN / "caption_decoder.pth", torch.bfloat16)
    assert stored.model.manual_cast_dtype == torch.float32  # the CPU computes in single precision
    assert 0 < relative(sample(stored, *prompts), sample(model, *prompts)) < 0.1
    eighth = uni.model.load_unidiffuser(GOLDEN / "uvit.pth", GOLDEN / "caption_decoder.pth", torch.float8_e4m3fn)
    assert (
        relative(sample(stored, *prompts), sample(model, *prompts))
        < relative(sample(eighth, *prompts), sample(model, *prompts))
        < 0.3
    )


def test_partly_loaded(model, golden):
    """What --lowvram does: layers beyond the memory stay where they are and are cast one at a time."""

    network = model.model.diffusion_model
    state = torch.cat([golden["in.latent"], torch.zeros(2, 2, 16, 16)], dim=1)
    context = torch.zeros(2, 77, 64)
    with torch.no_grad():
        model.load(torch.device("cpu"), lowvram_model_memory=0)
        whole = network(state, golden["in.t_img"], context)
        model.unpatch_model()
        model.load(torch.device("cpu"), lowvram_model_memory=1)
        cast = [module for module in network.modules() if getattr(module, "comfy_cast_weights", False)]
        assert len(cast) > 20
        assert torch.equal(network(state, golden["in.t_img"], context), whole)


def test_memory_estimate_covers_what_is_used(model, golden):
    """The most that a prediction of two rows holds at once, by torch's own account."""
    from torch.profiler import ProfilerActivity, profile

    state, text = torch.randn(2, 5, 64, 64), torch.zeros(2, 77, 64)
    with torch.no_grad(), profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiled:
        model.model.diffusion_model(state, golden["in.t_img"], text)
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 2**20 < most < model.memory_required([2, 4, 64, 64])


def test_memory_estimate_grows_with_the_picture(model):
    small = model.memory_required([1, 4, 64, 64])
    assert model.memory_required([2, 4, 64, 64]) == pytest.approx(2 * small)
    assert model.memory_required([1, 4, 96, 96]) > 1.8 * small
