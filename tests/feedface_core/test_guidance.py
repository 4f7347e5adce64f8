"""The forms of guidance against their formulas, and which predictions they need."""

from __future__ import annotations

import pytest
import torch

from feedface_core.guidance import (
    FORMS,
    PREDICTIONS,
    Guidance,
    by_name,
    face_then_text,
    joint,
    text_face_background,
    text_then_face,
    three_weights,
)

EPS = dict(zip(PREDICTIONS, torch.randn(5, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), strict=True))
NONE, TEXT, FACE, BOTH, ALONE = (EPS[name] for name in PREDICTIONS)


@pytest.mark.parametrize(
    "guidance, expected",
    [
        (joint(5.0), BOTH + 5 * (BOTH - NONE)),
        (text_then_face(6.0, 4.0), NONE + 6 * (TEXT - NONE) + 4 * (BOTH - TEXT)),
        (face_then_text(6.0, 4.0), NONE + 4 * (FACE - NONE) + 6 * (BOTH - FACE)),
        (three_weights(2.0, 1.0, 3.0), NONE + 2 * (TEXT - NONE) + 1 * (FACE - NONE) + 3 * (BOTH - NONE)),
        (text_face_background(6.0, 4.0, 2.0), NONE + 6 * (TEXT - NONE) + 4 * (ALONE - TEXT) + 2 * (BOTH - ALONE)),
    ],
)
def test_forms(guidance, expected):
    torch.testing.assert_close(guidance.combine(EPS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "guidance, needed",
    [
        (joint(5.0), ("dropped", "both")),
        (joint(0.0), ("both",)),
        (text_then_face(6.0, 4.0), ("dropped", "text", "both")),
        (text_then_face(4.0, 4.0), ("dropped", "both")),
        (text_then_face(1.0, 4.0), ("text", "both")),
        (text_then_face(6.0, 0.0), ("dropped", "text")),
        (face_then_text(6.0, 4.0), ("dropped", "face", "both")),
        (three_weights(0.7, 0.2, 0.1), ("text", "face", "both")),
        (three_weights(0.0, 0.0, 7.5), ("dropped", "both")),
        (text_face_background(6.0, 4.0, 2.0), ("dropped", "text", "both", "no_background")),
        (text_face_background(6.0, 4.0, 4.0), ("dropped", "text", "both")),
        (text_face_background(6.0, 4.0, 0.0), ("dropped", "text", "no_background")),
    ],
)
def test_needed_predictions(guidance, needed):
    assert guidance.needed == needed
    guidance.combine({name: EPS[name] for name in needed})


@pytest.mark.parametrize(
    "guidance", [joint(3.3), text_then_face(7.1, 2.3), face_then_text(0.3, 9.0), three_weights(0.7, 0.2, 0.1)]
)
def test_coefficients_sum_to_one(guidance):
    """So guidance of equal predictions is that prediction, for ε, v and denoised pictures alike."""
    assert sum(getattr(guidance, name) for name in PREDICTIONS) == pytest.approx(1.0)


def test_a_missing_prediction_is_an_error():
    with pytest.raises(KeyError, match="dropped"):
        joint(5.0).combine({"both": BOTH})


def test_scales_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="finite"):
        text_then_face(float("nan"), 1.0)
    with pytest.raises(ValueError, match="finite"):
        Guidance(float("inf"), 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "guidance",
    [
        joint(3.3),
        text_then_face(7.1, 2.3),
        text_then_face(0.0, 2.0),
        face_then_text(0.3, 9.0),
        three_weights(0.7, 0.2, 0.1),
    ],
)
def test_every_form_is_one_scale_on_one_conditional_prediction(guidance):
    conditional = guidance.conditional(EPS)
    guided = NONE + guidance.scale * (conditional - NONE)
    if guidance.dropped != 1.0:
        torch.testing.assert_close(guided, guidance.combine(EPS), atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(conditional, guidance.combine(EPS))


def test_forms_by_name():
    built = {form: by_name(form, 6.0, 4.0, 2.0) for form in FORMS}
    assert built == {
        "joint": joint(6.0),
        "text_then_face": text_then_face(6.0, 4.0),
        "face_then_text": face_then_text(6.0, 4.0),
        "three_weights": three_weights(6.0, 4.0, 2.0),
        "text_face_background": text_face_background(6.0, 4.0, 2.0),
    }
    with pytest.raises(ValueError, match="guidance form 'both', expected one of"):
        by_name("both", 1.0, 1.0)
