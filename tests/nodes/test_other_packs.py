"""Beside nodes that clone, tile, cache, window or compile the model."""

from __future__ import annotations

import logging

import pytest
import torch
from support.small_model import NEGATIVE, POSITIVE, apply, build_model, prompt, sample


def close(found, expected, error=1e-5):
    return (found - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("adapters", [1, 2])
def test_a_clone_onto_other_weights_runs_those(pack, adapter, make_adapter, face, adapters):
    """As the core's TorchCompileModel and its clones for several GPUs make them."""
    old, fresh = build_model(seed=0), build_model(seed=1)
    patched = apply(pack, old, adapter, face)
    expected = apply(pack, fresh, adapter, face)
    if adapters == 2:
        second = make_adapter(seed=2)
        own = pack.conditioning.Face(face.hidden, encoder=second.encoder_fingerprint)
        patched, expected = (apply(pack, one, second, own) for one in (patched, expected))
    calls = []
    for block in old.model.diffusion_model.modules():
        if hasattr(block, "attn2"):
            block.register_forward_pre_hook(lambda *_: calls.append(1))
    if not hasattr(fresh, "get_clone_model_override"):
        pytest.skip("this ComfyUI makes no clones onto other weights")
    clone = patched.clone(model_override=fresh.get_clone_model_override())
    plain = sample(fresh)
    picture = sample(clone)
    assert not calls
    assert torch.equal(picture, sample(expected)) and not torch.equal(picture, plain)
    assert torch.equal(sample(fresh), plain)
    assert not torch.equal(sample(patched), picture) and calls


def tiles_at_once(model):
    """A model whose evaluations are cut into four tiles that run as one batch, as Tiled Diffusion does."""
    tiled = model.clone()

    def wrapper(apply_model, arguments):
        x, c = arguments["input"], arguments["c"]
        half = x.shape[-1] // 2
        spots = [(slice(i, i + half), slice(j, j + half)) for i in (0, half) for j in (0, half)]
        batch = torch.cat([x[:, :, rows, columns] for rows, columns in spots])
        repeated = {key: value.repeat(4, 1, 1) if key == "c_crossattn" else value for key, value in c.items()}
        parts = apply_model(batch, arguments["timestep"].repeat(4), **repeated).chunk(4)
        out = torch.empty_like(x)
        for (rows, columns), part in zip(spots, parts, strict=True):
            out[:, :, rows, columns] = part
        return out

    tiled.set_model_unet_function_wrapper(wrapper)
    return tiled


def tiles_one_by_one(model):
    tiled = model.clone()

    def wrapper(apply_model, arguments):
        x, half = arguments["input"], arguments["input"].shape[-1] // 2
        out = torch.empty_like(x)
        for i in (0, half):
            for j in (0, half):
                part = x[:, :, i : i + half, j : j + half]
                out[:, :, i : i + half, j : j + half] = apply_model(part, arguments["timestep"], **arguments["c"])
        return out

    tiled.set_model_unet_function_wrapper(wrapper)
    return tiled


def test_tiles_in_one_batch(pack, model, adapter, face):
    patched = apply(pack, model, adapter, face)
    together = sample(tiles_at_once(patched), batch=2)
    assert close(together, sample(tiles_one_by_one(patched), batch=2))
    assert not close(together, sample(tiles_at_once(model), batch=2), 1e-3)


def test_a_batch_that_is_no_multiple_is_refused(pack, model, adapter, face):
    patched = apply(pack, model, adapter, face)

    def wrapper(apply_model, arguments):
        x = torch.cat([arguments["input"], arguments["input"][:1]])
        c = {
            key: torch.cat([value, value[:1]]) if isinstance(value, torch.Tensor) else value
            for key, value in arguments["c"].items()
        }
        return apply_model(x, torch.cat([arguments["timestep"]] * 2)[: len(x)], **c)[:-1]

    patched.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(ValueError, match="called with 3 rows, but ComfyUI stacked 2 .* batch size to 1"):
        sample(patched)


def past_apply_model(model):
    """A model that is called without ``apply_model``, as DeepCache does."""
    past = model.clone()

    def wrapper(apply_model, arguments):
        base, x, sigma, c = apply_model.__self__, arguments["input"], arguments["timestep"], arguments["c"]
        scaled = base.model_sampling.calculate_input(sigma, x)
        out = base.diffusion_model(
            scaled,
            base.model_sampling.timestep(sigma).float(),
            context=c["c_crossattn"],
            transformer_options=c["transformer_options"],
        )
        return base.model_sampling.calculate_denoised(sigma, out, x)

    past.set_model_unet_function_wrapper(wrapper)
    return past


def test_a_call_past_apply_model_has_the_face(pack, model, adapter, face):
    patched = apply(pack, model, adapter, face)
    assert torch.equal(sample(past_apply_model(patched)), sample(patched))


def test_a_model_that_skips_its_blocks_is_reported(pack, model, adapter, face, caplog):
    patched = apply(pack, model, adapter, face)
    with caplog.at_level(logging.WARNING):
        sample(patched)
        sample(apply(pack, model, adapter, face, strength=0.0))
        sample(apply(pack, model, adapter, face, start=0.99), steps=1)
        assert not [record for record in caplog.records if "did not reach" in record.message]
        skipping = patched.clone()
        skipping.set_model_unet_function_wrapper(lambda apply_model, arguments: arguments["input"] * 0.5)
        sample(skipping)
    assert [record for record in caplog.records if "did not reach the picture" in record.message]


def in_windows(model, length: int):
    """A model that samples a batch in windows of some pictures, as the core's Context Windows does."""
    import comfy.context_windows as core

    windowed = model.clone()
    windowed.model_options["context_handler"] = core.IndexListContextHandler(
        core.get_matching_context_schedule(core.ContextSchedules.BATCHED),
        core.get_matching_fuse_method(core.ContextFuseMethods.FLAT),
        context_length=length,
        context_overlap=0,
        dim=0,
    )
    core.create_prepare_sampling_wrapper(windowed)
    return windowed


def test_context_windows_take_the_masks_of_their_pictures(pack, model, adapter, face):
    masks = torch.stack([torch.full((16, 16), float(on)) for on in (1, 0, 0, 1)])
    try:
        plain = sample(in_windows(model, 2), batch=4)
    except RuntimeError as error:
        pytest.skip(f"this ComfyUI has no windows over a batch, with or without a face: {error}")
    masked = apply(pack, model, adapter, face, mask=masks)
    faced = sample(in_windows(masked, 2), batch=4)
    assert [not close(faced[index], plain[index]) for index in range(4)] == [True, False, False, True]
    assert close(faced, sample(masked, batch=4))


def test_compiling_reaches_no_limit(pack, comfy, make_adapter, crops):
    """A compiled model is one graph: neither prompts, runs and faces nor another Apply compile it again."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.testing import CompileCounter

    model = build_model(channel_mult=[1], num_res_blocks=[1], transformer_depth=[1], transformer_depth_output=[1, 1])
    adapter = make_adapter(sites=pack.sd_unet.default_sites(model.get_model_object("diffusion_model")))
    counter = CompileCounter()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for crop in crops.split(1):
            patched = apply(pack, model, adapter, pack.face.EncodeFaces.execute(adapter, crop).args[0])
            compiled = patched.clone()
            set_torch_compile_wrapper(compiled, backend=counter)
            for number in range(2):
                positive = prompt(number)
                assert close(sample(compiled, positive), sample(patched, positive))
    assert counter.frame_count == 1
    torch._dynamo.reset()


# An adapter trained with a null face.


@pytest.fixture
def null_adapter(make_adapter):
    adapter = make_adapter(null="learned")
    torch.nn.init.normal_(adapter.patcher(torch.float32).model.null_tokens, generator=torch.Generator().manual_seed(1))
    return adapter


def set_face(pack, conditioning, face=None, strength=1.0):
    return pack.apply.SetFace.execute(conditioning, strength, face, None, None).args[0]


def test_prompts_without_a_face_get_the_null_face(pack, model, null_adapter, face):
    """Whether the face comes from Apply or from Set Face, the negative has the null face that training knew."""
    positive, negative = prompt(POSITIVE), prompt(NEGATIVE)
    everywhere = sample(apply(pack, model, null_adapter, face), positive, negative)
    own = sample(apply(pack, model, null_adapter), set_face(pack, positive, face), negative)
    assert torch.equal(own, everywhere)
    assert not close(own, sample(apply(pack, model, null_adapter), set_face(pack, positive, face), negative, cfg=1.0))
    # At cfg 0 only the negative counts: the null face changes it.
    assert not close(
        sample(apply(pack, model, null_adapter, face), positive, negative, cfg=0.0),
        sample(model, positive, negative, cfg=0.0),
        1e-3,
    )


def test_without_any_face_the_null_face_is_off(pack, model, null_adapter, face):
    assert torch.equal(sample(apply(pack, model, null_adapter)), sample(model))
    assert torch.equal(sample(apply(pack, model, null_adapter, face, strength=0.0)), sample(model))


def test_a_prompt_that_lost_its_face_has_the_null_face(pack, model, null_adapter, face):
    """Two prompts, one with the face taken away: it is what a negative would be."""
    positive, second = prompt(POSITIVE), prompt(NEGATIVE)
    patched = apply(pack, model, null_adapter, face)
    taken = sample(patched, positive + set_face(pack, second), prompt(13), cfg=1.0)
    kept = sample(patched, positive + second, prompt(13), cfg=1.0)
    assert not close(taken, kept, 1e-3)


def test_zeroed_text_keeps_the_face(pack, comfy, model, adapter, face):
    """As the tooltip of Set Face says: nodes behind it that change the text keep the face."""
    import nodes

    zeroed = nodes.ConditioningZeroOut().zero_out(set_face(pack, prompt(POSITIVE), face))[0]
    plain = nodes.ConditioningZeroOut().zero_out(prompt(POSITIVE))[0]
    patched = apply(pack, model, adapter)
    assert not close(sample(patched, zeroed, prompt(NEGATIVE)), sample(patched, plain, prompt(NEGATIVE)), 1e-3)
