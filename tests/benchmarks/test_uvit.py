"""The U-ViT benchmark at a small size: its keys, its counts, and that the plain way computes the same picture."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def bench(comfy, monkeypatch):
    from benchmarks import uvit as bench_uvit
    from benchmarks.support import sampling_speed

    monkeypatch.setenv("COMFYUI_PATH", str(comfy.path))
    small_encoder = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setattr(sampling_speed, "VIT_B32", {**sampling_speed.VIT_B32, **small_encoder})

    return bench_uvit


def small(comfy):
    sizes = {"width": 96, "heads": 2, "depth": 6, "hidden": 384, "grid": (4, 4)}
    return comfy.module("feedface_core.modules.uvit_config").UViTConfig(**sizes)


def test_keys_and_counts(comfy, bench):
    said = []
    result = bench.run_uvit(8, 1, small(comfy), said.append)
    assert {
        "unpatched_s",
        "face_s",
        "off_s",
        "overhead",
        "counted_overhead",
        "off_ratio",
        "sites",
        "kv_projections",
        "swap_s",
        "encode_s",
        "plain_s",
    } <= result.keys()
    assert result["kv_projections"] == result["sites"] == 2
    # Two rows and new keys and values against one row: more than twice the operations of the branches.
    assert result["plain_counted_overhead"] > 2 * result["counted_overhead"] > 0
    assert "branches" in said[1]


def test_plain_way_is_the_same_step(comfy, bench, tmp_path):
    from benchmarks.support.sampling_speed import Steps, apply, load_pack, random_adapter

    pack = load_pack(
        model="nodes.unidiffuser.model",
        uvit="feedface_core.modules.uvit",
        uvit_config="feedface_core.modules.uvit_config",
    )
    model = bench.build_model(pack, small(comfy))
    sites = pack.uvit.default_sites(model.model.diffusion_model)
    adapter = random_adapter(pack, tmp_path, "unidiffuser", sites, 96, tap="output")
    crops = torch.rand(1, 224, 224, 3, generator=torch.Generator().manual_seed(0))
    face = pack.face.EncodeFaces.execute(adapter, crops).args[0]
    ours = apply(pack, model, adapter, face, 0.8)
    plain = bench.PlainBranches(pack, adapter.patcher(torch.bfloat16).model, face.hidden, 0.8).apply_to(model)

    def picture(variant):
        import comfy.sample

        steps = Steps(8)
        with torch.inference_mode():
            return comfy.sample.sample(
                variant,
                steps.noise,
                1,
                3.0,
                "euler",
                "normal",
                steps.positive,
                steps.negative,
                torch.zeros_like(steps.noise),
                seed=0,
                disable_pbar=True,
            )

    off, ours, plain = picture(model), picture(ours), picture(plain)
    assert (ours - plain).norm() < 0.05 * (ours - off).norm()  # bfloat16
