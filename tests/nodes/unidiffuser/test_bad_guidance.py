"""Numbers that no widget gives, in the nodes that guide UniDiffuser."""

from __future__ import annotations

from typing import Any

import pytest
from support.refused import refused

NAN, INF = float("nan"), float("inf")
NO_NUMBER = [NAN, INF, -INF, 1e308, -1e308, 10**400, "4.0", "", None, True, [1.0], {}]


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("name", ["text_scale", "face_scale", "both_scale"])
@pytest.mark.parametrize("form", ["joint", "three weights"])
def test_scale(comfy, model, prompts, form: str, name: str, value: Any) -> None:
    node, error = comfy.module("nodes.guider").Guider, comfy.module("feedface_core.errors").FeedFaceError
    good = {"positive": prompts[0], "negative": prompts[1], "text_scale": 3.0, "face_scale": 2.0, "both_scale": 0.0}
    node.execute(model=model, form=form, **good)
    refused(lambda: node.execute(model=model, form=form, **{**good, name: value}), "FeedFace Guider", name, error=error)


@pytest.mark.parametrize("value", [*NO_NUMBER, 2.5, -1, 2**64], ids=lambda value: repr(value)[:20])
def test_seed(comfy, uni, value: Any) -> None:
    error = comfy.module("feedface_core.errors").FeedFaceError
    refused(lambda: uni.nodes.UnconditionalText.execute(value), "FeedFace Unconditional Text", "seed", error=error)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, 3.0])
def test_every_seed_samples(uni, model, prompts, seed: Any) -> None:
    negative = uni.nodes.UnconditionalText.execute(seed).args[0]
    out = model.model.extra_conds(**negative[0][1], cross_attn=None, device=model.load_device, noise=None)
    assert out["c_crossattn"].cond.isfinite().all()
