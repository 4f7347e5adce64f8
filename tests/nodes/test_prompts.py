"""The right face on the right prompt, under every guider and kind of conditioning ComfyUI has."""

from __future__ import annotations

import pytest
import torch
from support.small_model import NEGATIVE, POSITIVE, apply, build_model, prompt, sample


def set_face(pack, conditioning, face=None, strength=1.0, mask=None, adapter=None):
    return pack.apply.SetFace.execute(conditioning, strength, face, mask, adapter).args[0]


def core_guider(name: str, module: str, model, *conds, **settings):
    """One of ComfyUI's own guiders."""
    import importlib

    guider = getattr(importlib.import_module(f"comfy_extras.{module}"), name)(model)
    guider.set_conds(*conds)
    guider.set_cfg(**settings)
    return guider


@pytest.fixture
def rows_seen(pack, monkeypatch):
    """For each call of a model's blocks: the faces of the batch's rows, by the hidden states they came from."""
    seen = []
    original = pack.site.Site.add_control

    def spy(self, adapter, index, args, kwargs, returned, rows, *more):
        if index == 0:
            faces = [control and control.face for count, control in rows for _ in range(count)]
            # The prompt of each row, by its first value, tells which conditioning it belongs to.
            prompts = [round(float(row[0, 0]), 4) for row in kwargs["context"]]
            seen.append(dict(zip(prompts, faces, strict=True)))
        return original(self, adapter, index, args, kwargs, returned, rows, *more)

    monkeypatch.setattr(pack.site.Site, "add_control", spy)
    return seen


def tag(conditioning) -> float:
    return round(float(conditioning[0][0][0, 0, 0]), 4)


POS, NEG, MIDDLE = prompt(POSITIVE), prompt(NEGATIVE), prompt(13)


def merged(seen):
    assert seen
    out = {}
    for call in seen:
        for key, face in call.items():
            assert out.setdefault(key, face) is face
    return out


def test_ksampler(pack, model, adapter, face, rows_seen):
    sample(apply(pack, model, adapter, face), POS, NEG)
    assert merged(rows_seen) == {tag(POS): face, tag(NEG): None}


def test_cfg_one_runs_only_the_row_with_the_face(pack, model, adapter, face, rows_seen):
    sample(apply(pack, model, adapter, face), POS, NEG, cfg=1.0)
    assert merged(rows_seen) == {tag(POS): face}


def test_dual_cfg(pack, comfy, model, adapter, face, rows_seen):
    patched = apply(pack, model, adapter, face)
    guider = core_guider("Guider_DualCFG", "nodes_custom_sampler", patched, POS, MIDDLE, NEG, cfg1=2.0, cfg2=3.0)
    sample(patched, guider=guider)
    assert merged(rows_seen) == {tag(POS): face, tag(MIDDLE): None, tag(NEG): None}


def test_dual_cfg_with_a_face_of_its_own_in_the_middle(pack, comfy, model, adapter, face, other_face, rows_seen):
    patched = apply(pack, model, adapter, face)
    middle = set_face(pack, MIDDLE, other_face)
    guider = core_guider("Guider_DualCFG", "nodes_custom_sampler", patched, POS, middle, NEG, cfg1=2.0, cfg2=3.0)
    sample(patched, guider=guider)
    assert merged(rows_seen) == {tag(POS): face, tag(MIDDLE): other_face, tag(NEG): None}


def test_perp_neg(pack, comfy, model, adapter, face, rows_seen):
    patched = apply(pack, model, adapter, face)
    guider = core_guider("Guider_PerpNeg", "nodes_perpneg", patched, POS, NEG, MIDDLE, cfg=3.0, neg_scale=1.0)
    sample(patched, guider=guider)
    assert merged(rows_seen) == {tag(POS): face, tag(MIDDLE): None, tag(NEG): None}


def test_two_people_in_two_areas(pack, model, adapter, face, other_face, rows_seen):
    """(h, w, y, x) areas in latent pixels; each row meets the branch with its own face and token grid."""
    left = set_face(pack, prompt(21, area=(16, 8, 0, 0), strength=1.0, set_area_to_bounds=False), face)
    right = set_face(
        pack,
        prompt(22, area=(16, 8, 0, 8), strength=1.0, set_area_to_bounds=False),
        other_face,
        mask=torch.ones(1, 16, 16),
    )
    out = sample(apply(pack, model, adapter), left + right, NEG)
    assert merged(rows_seen) == {tag(left): face, tag(right): other_face, tag(NEG): None}
    assert torch.isfinite(out).all()


def test_a_mask_follows_the_area(pack, model, adapter, face):
    """An area over the right half sees the right half of the mask: zeros there are the same as no face."""
    mask = torch.ones(1, 16, 16)
    mask[..., 8:] = 0
    area = {"area": (16, 8, 0, 8), "strength": 1.0, "set_area_to_bounds": False}
    patched = apply(pack, model, adapter)
    masked = sample(patched, set_face(pack, prompt(22, **area), face, mask=mask) + POS, NEG)
    assert torch.equal(masked, sample(model, prompt(22, **area) + POS, NEG))
    mask[..., 8:] = 1
    assert not torch.equal(sample(patched, set_face(pack, prompt(22, **area), face, mask=mask) + POS, NEG), masked)


def test_masked_prompts(pack, model, adapter, face, rows_seen):
    mask = torch.zeros(1, 16, 16)
    mask[..., :8] = 1
    left = set_face(pack, prompt(21, mask=mask, mask_strength=1.0, set_area_to_bounds=False), face)
    right = set_face(pack, prompt(22, mask=1 - mask, mask_strength=1.0, set_area_to_bounds=False))
    sample(apply(pack, model, adapter, face), left + right, NEG)
    assert merged(rows_seen) == {tag(left): face, tag(right): None, tag(NEG): None}


def test_conditionings_with_hooks(pack, comfy, model, adapter, face, other_face, rows_seen):
    import comfy.hooks

    def hooked(conditioning, key, strength):
        weight = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_v.weight
        group = comfy.hooks.create_hook_lora({}, strength, strength)
        group.hooks[0].weights = {f"diffusion_model.{key}": ("diff", (torch.full_like(weight, 0.05),))}
        group.hooks[0].need_weight_init = False
        return comfy.hooks.set_hooks_for_conditioning(conditioning, group)

    key = "input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight"
    first = hooked(set_face(pack, prompt(21), face), key, 1.0)
    second = hooked(set_face(pack, prompt(22), other_face), key, 0.5)
    with_face = sample(apply(pack, model, adapter), first + second, NEG)
    assert merged(rows_seen) == {tag(first): face, tag(second): other_face, tag(NEG): None}
    assert not torch.equal(with_face, sample(model, first + second, NEG))


def test_short_memory_splits_the_batch(pack, comfy, model, adapter, face, rows_seen, monkeypatch):
    patched = apply(pack, model, adapter, face)
    together = sample(patched, POS, NEG)
    calls = len(rows_seen)

    def short(device=None, torch_free_too=False):  # the sampler asks for one number, attention for two
        return (2**33, 2**33) if torch_free_too else 1.0

    monkeypatch.setattr("comfy.model_management.get_free_memory", short)
    split = sample(patched, POS, NEG)
    assert all(len(call) == 1 for call in rows_seen[calls:]) and len(rows_seen) == 3 * calls
    assert (split - together).norm() <= 1e-5 * together.norm()


def test_batch_of_pictures(pack, model, adapter, face):
    """Each picture of a batch gets the face; a batch is the pictures one by one."""
    import comfy.sample

    patched = apply(pack, model, adapter, face)
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(5))

    def run(rows):
        return comfy.sample.sample(
            patched, rows, 2, 3.0, "euler", "normal", POS, NEG, torch.zeros_like(rows), seed=1, disable_pbar=True
        )

    whole = run(noise)
    single = torch.cat([run(noise[index : index + 1]) for index in range(3)])
    assert (whole - single).norm() <= 1e-5 * whole.norm()


def test_a_mask_for_each_picture(pack, model, adapter, face):
    masks = torch.stack([torch.zeros(16, 16), torch.ones(16, 16)])
    plain, faced = sample(model, batch=2), sample(apply(pack, model, adapter, face, mask=masks), batch=2)
    assert torch.equal(plain[0], faced[0])
    assert (plain[1] - faced[1]).abs().max() > 0.01


def test_set_face_none_takes_the_face_away(pack, model, adapter, face):
    assert torch.equal(sample(apply(pack, model, adapter, face), set_face(pack, POS), NEG), sample(model, POS, NEG))


def test_set_face_on_the_negative(pack, model, adapter, face, other_face, rows_seen):
    negative = set_face(pack, NEG, other_face, strength=0.5)
    sample(apply(pack, model, adapter, face), POS, negative)
    assert merged(rows_seen) == {tag(POS): face, tag(NEG): other_face}


def test_set_face_leaves_its_input_alone(pack, face):
    original = prompt(30)
    first = set_face(pack, original, face)
    set_face(pack, first, None, adapter=None)
    assert pack.patches.CONTROLS not in original[0][1]
    assert first[0][1][pack.patches.CONTROLS][None].face is face


def test_controlnet(pack, comfy, model, adapter, face):
    """A ControlNet's residuals and the face both reach the picture, and neither disturbs the other's absence."""

    import comfy.controlnet

    class Residual(comfy.controlnet.ControlBase):
        """A ControlNet whose network always answers 0.3 for the middle block."""

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            shape = (x_noisy.shape[0], 64, x_noisy.shape[2] // 2, x_noisy.shape[3] // 2)
            return {"middle": [torch.full(shape, 0.3)]}

    controlled = prompt(POSITIVE, control=Residual(), control_apply_to_uncond=True)
    patched = apply(pack, model, adapter, face)
    both = sample(patched, controlled, NEG)
    assert not torch.equal(both, sample(patched, POS, NEG))
    assert not torch.equal(both, sample(model, controlled, NEG))
    off = apply(pack, model, adapter, face, strength=0.0)
    assert torch.equal(sample(off, controlled, NEG), sample(model, controlled, NEG))


def test_lora_on_the_same_blocks(pack, model, adapter, face):
    """LoRA keys still resolve on a patched model, before or after it."""
    weight = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_v.weight
    lora = {
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight": (
            "diff",
            (torch.full_like(weight, 0.2),),
        )
    }

    def with_lora(patcher):
        clone = patcher.clone()
        assert clone.add_patches(lora, 1.0)
        return clone

    after, before = with_lora(apply(pack, model, adapter, face)), apply(pack, with_lora(model), adapter, face)
    picture = sample(after)
    assert torch.equal(picture, sample(before))
    assert not torch.equal(picture, sample(with_lora(model)))
    assert not torch.equal(picture, sample(apply(pack, model, adapter, face)))


def test_two_adapters(pack, model, adapter, make_adapter, face, other_face):
    second = make_adapter(seed=2)
    faces = pack.conditioning.Face(other_face.hidden, encoder=second.encoder_fingerprint)
    one = apply(pack, model, adapter, face)
    two = apply(pack, one, second, faces)
    assert not torch.equal(sample(two), sample(one))
    assert torch.equal(sample(apply(pack, one, second, faces, strength=0.0)), sample(one))
    mirrored = apply(pack, apply(pack, model, second, faces), adapter, face)  # another order, the same sum
    assert (sample(two) - sample(mirrored)).norm() < 0.5 * (sample(two) - sample(model)).norm()


def test_set_face_for_one_of_two_adapters(pack, model, adapter, make_adapter, face, other_face):
    second = make_adapter(seed=2)
    faces = pack.conditioning.Face(other_face.hidden, encoder=second.encoder_fingerprint)
    two = apply(pack, apply(pack, model, adapter, face), second, faces)
    without_second = set_face(pack, POS, adapter=second)
    assert torch.equal(sample(two, without_second, NEG), sample(apply(pack, model, adapter, face), POS, NEG))


def test_hypertile_and_other_attention_patches(pack, comfy, model, adapter, face):
    from comfy_extras.nodes_hypertile import HyperTile

    tiled = HyperTile.execute(model, 128, 2, 0, False)[0]
    assert torch.isfinite(sample(apply(pack, tiled, adapter, face), size=(32, 32))).all()

    patched = model.clone()
    patched.set_model_attn2_patch(lambda n, context, value, options: (n * 1.1, context, value))
    both = sample(apply(pack, patched, adapter, face))
    assert not torch.equal(both, sample(patched))
    assert not torch.equal(both, sample(apply(pack, model, adapter, face)))
    later = apply(pack, model, adapter, face)
    later.set_model_attn2_patch(lambda n, context, value, options: (n * 1.1, context, value))
    assert torch.equal(sample(later), both)


def test_sdxl_shape(pack, make_adapter, crops):
    """Several blocks in a spatial transformer: the default is the last of each."""
    model = build_model(transformer_depth=[0, 2], transformer_depth_output=[0, 0, 2, 2], transformer_depth_middle=2)
    sites = pack.sd_unet.default_sites(model.get_model_object("diffusion_model"))
    assert [site.name.rsplit(".", 1)[1] for site in sites] == ["1"] * len(sites)
    adapter = make_adapter(sites=sites)
    face = pack.face.EncodeFaces.execute(adapter, crops).args[0]
    assert not torch.equal(sample(apply(pack, model, adapter, face)), sample(model))
