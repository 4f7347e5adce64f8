"""The FeedFace guider against ComfyUI's CFGGuider and against the formulas, written out."""

from __future__ import annotations

import pytest
import torch
from support.small_model import NEGATIVE, POSITIVE, apply, prompt, sample

POS, NEG = prompt(POSITIVE), prompt(NEGATIVE)


def make(pack, model, form, text=3.0, face=2.0, both=0.5, positive=POS, negative=NEG):
    return pack.guidance.Guider.execute(model, positive, negative, text, face, form, both).args[0]


@pytest.fixture
def patched(pack, model, adapter, face):
    return apply(pack, model, adapter, face)


@pytest.fixture
def predictions(pack, model, adapter, face, patched):
    """The four predictions of one step, each from a run of its own at cfg 1."""

    def one(model, conditioning):
        return sample(model, conditioning, NEG, cfg=1.0, steps=1)

    return {"dropped": one(model, NEG), "text": one(model, POS), "face": one(patched, NEG), "both": one(patched, POS)}


def test_joint_equals_comfyui_at_scale_plus_one(pack, patched):
    out = sample(patched, guider=make(pack, patched, "joint", text=4.0), steps=3)
    assert torch.equal(out, sample(patched, POS, NEG, cfg=5.0, steps=3))


@pytest.mark.parametrize("form", ["text, then face", "face, then text", "three weights"])
@pytest.mark.parametrize("scales", [(3.0, 2.0, 0.5), (1.5, 4.0, 1.0)])
def test_forms_equal_their_formulas(pack, patched, predictions, form, scales):
    text, face, both = scales
    none, t, f, tf = (predictions[name] for name in ("dropped", "text", "face", "both"))
    expected = {
        "text, then face": none + text * (t - none) + face * (tf - t),
        "face, then text": none + face * (f - none) + text * (tf - f),
        "three weights": none + text * (t - none) + face * (f - none) + both * (tf - none),
    }[form]
    out = sample(patched, guider=make(pack, patched, form, *scales), steps=1)
    assert (out - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "form, scales, rows",
    [
        ("text, then face", (3.0, 2.0, 0.0), 3),
        ("text, then face", (3.0, 3.0, 0.0), 2),  # ε(t,∅) cancels
        ("text, then face", (1.0, 2.0, 0.0), 2),  # ε(∅,∅) cancels
        ("text, then face", (1.0, 1.0, 0.0), 1),
        ("face, then text", (3.0, 2.0, 0.0), 3),
        ("three weights", (3.0, 2.0, 1.0), 4),
        ("three weights", (3.0, 0.0, 0.0), 2),
        ("three weights", (0.7, 0.2, 0.1), 3),  # what rounding leaves of 1 − 0.7 − 0.2 − 0.1 is no row
        ("joint", (0.0, 0.0, 0.0), 1),
        ("joint", (2.0, 0.0, 0.0), 2),
    ],
)
def test_a_weight_of_zero_skips_its_prediction(pack, patched, form, scales, rows):
    seen = []
    counted = patched.clone()
    counted.set_model_unet_function_wrapper(
        lambda apply_model, args: (
            seen.append(args["input"].shape[0]),
            apply_model(args["input"], args["timestep"], **args["c"]),
        )[1]
    )
    sample(counted, guider=make(pack, counted, form, *scales), steps=1)
    assert sum(seen) == rows


def test_equal_scales_in_a_nested_form_are_plain_guidance(pack, patched):
    out = sample(patched, guider=make(pack, patched, "text, then face", 4.0, 4.0))
    expected = sample(patched, POS, NEG, cfg=4.0)
    assert (out - expected).norm() <= 1e-5 * expected.norm()


def test_face_only_prediction_keeps_the_regions_of_the_prompt(pack, model, adapter, face, other_face):
    """Two people in two areas: with text scale 0 the faces still act in their own areas."""
    areas = [(16, 8, 0, 0), (16, 8, 0, 8)]
    regions = [
        entry
        for area, who in zip(areas, (face, other_face), strict=True)
        for entry in pack.apply.SetFace.execute(prompt(20, area=area, strength=1.0), 1.0, who).args[0]
    ]
    patched = apply(pack, model, adapter)
    out = sample(patched, guider=make(pack, patched, "three weights", 0.0, 1.0, 0.0, positive=regions), steps=1)
    faced = [
        pack.apply.SetFace.execute(prompt(NEGATIVE, area=area, strength=1.0), 1.0, who).args[0][0]
        for area, who in zip(areas, (face, other_face), strict=True)
    ]
    expected = sample(patched, faced, NEG, cfg=1.0, steps=1)
    assert (out - expected).norm() <= 1e-5 * expected.norm()


def with_core_node(model, module: str, node: str, *values):
    """A model behind one of ComfyUI's own nodes."""
    import importlib

    found = getattr(importlib.import_module(f"comfy_extras.{module}"), node)
    if hasattr(found, "execute"):
        return found.execute(model, *values)[0]
    return found().patch(model, *values)[0]


@pytest.mark.parametrize(
    "node",
    [
        ("nodes_model_advanced", "RescaleCFG", 0.7),  # in place of the guidance
        ("nodes_tcfg", "TCFG"),  # before it
        ("nodes_pag", "PerturbedAttentionGuidance", 3.0),  # behind it
        ("nodes_mahiro", "Mahiro"),
        ("nodes_apg", "APG", 1.0, 5.0, 0.0),
        ("nodes_cfg", "CFGZeroStar"),
    ],
    ids=lambda node: node[1],
)
def test_functions_of_other_nodes_run(pack, comfy, patched, node):
    """With equal scales the form is plain guidance, so each node does what it does under KSampler; with others as well
    it changes the picture."""
    changed = with_core_node(patched, *node)
    expected = sample(changed, POS, NEG, cfg=4.0)
    assert (expected - sample(patched, POS, NEG, cfg=4.0)).norm() > 1e-3 * expected.norm()
    out = sample(changed, guider=make(pack, changed, "text, then face", 4.0, 4.0))
    assert (out - expected).norm() <= 1e-5 * expected.norm()
    for form in ("text, then face", "face, then text", "three weights"):
        separate = sample(changed, guider=make(pack, changed, form, 4.0, 2.0))
        plain = sample(patched, guider=make(pack, patched, form, 4.0, 2.0))
        assert torch.isfinite(separate).all() and (separate - plain).norm() > 1e-3 * plain.norm()


def test_a_function_instead_of_the_evaluation_runs(pack, patched):
    import comfy.samplers

    changed, calls = patched.clone(), []

    def evaluate(args):
        calls.append(len(args["conds"]))
        return comfy.samplers.calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        )

    changed.set_model_sampler_calc_cond_batch_function(evaluate)
    out = sample(changed, guider=make(pack, changed, "text, then face"), steps=1)
    assert torch.equal(out, sample(patched, guider=make(pack, patched, "text, then face"), steps=1)) and calls == [3]


def test_post_cfg_functions_of_other_nodes_run(pack, patched):
    changed = patched.clone()
    changed.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.5)
    out = sample(changed, guider=make(pack, changed, "text, then face"), steps=1)
    plain = sample(patched, guider=make(pack, patched, "text, then face"), steps=1)
    assert (out - plain * 0.5).norm() <= 1e-5 * plain.norm()


def test_without_an_adapter_the_face_scale_has_nothing_to_act_on(pack, model):
    out = sample(model, guider=make(pack, model, "text, then face", 3.0, 9.0), steps=1)
    expected = sample(model, POS, NEG, cfg=3.0, steps=1)
    assert (out - expected).norm() <= 1e-4 * expected.norm()


def test_nothing_to_guide_by_is_refused(pack, model):
    with pytest.raises(ValueError, match="FeedFace Guider: positive and negative both need at least one prompt"):
        make(pack, model, "joint", positive=[])
