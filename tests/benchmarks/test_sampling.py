"""The sampling benchmark at a small size: its keys, its counts, and that the plain way computes the same picture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.tiny_checkpoint import TINY

KEYS = {
    "unpatched_s",
    "face_s",
    "off_s",
    "overhead",
    "counted_overhead",
    "off_ratio",
    "four_people_ratio",
    "four_people_counted_ratio",
    "sites",
    "kv_projections",
    "swap_s",
    "encode_s",
}
PLAIN = {"plain_s", "plain_overhead", "plain_counted_overhead", "plain_ratio"}


@pytest.fixture
def models(comfy, monkeypatch):
    """ComfyUI in this process, and an encoder that takes no time."""
    from benchmarks.support import comfy_models

    small_encoder = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setattr(comfy_models, "ENCODER", small_encoder)
    return comfy_models


def small_uvit(comfy):
    sizes = {"width": 96, "heads": 2, "depth": 6, "hidden": 384, "grid": (4, 4)}
    return comfy.module("feedface_core.modules.uvit_config").UViTConfig(**sizes)


def test_keys_and_counts_of_the_u_net(models):
    from benchmarks.sampling import run
    from benchmarks.support.step_speed import table

    result = run("sd", 8, 1, print, site_count=3, size=TINY)
    assert result.keys() == KEYS and result["kv_projections"] == result["sites"] == 3
    cheaper = run("sd", 8, 1, print, {"self_attention": False}, site_count=3, size=TINY)
    assert 0 < cheaper["counted_overhead"] < result["counted_overhead"]
    assert "for 3 sites" in table(result) and "plain" not in table(result)


def test_every_kind_of_branch_is_counted(models):
    from benchmarks.sampling import KINDS, count

    rows = {row["branches"]: row for row in count("sd", 8, print, {**KINDS, "rank 4": {"rank": 4}}, size=TINY)}
    full, attending, light, low = (rows[name] for name in ("full", "no self-attention", "light", "rank 4"))
    assert full["counted_overhead"] > attending["counted_overhead"] > 3 * light["counted_overhead"] > 0
    assert low["counted_overhead"] < full["counted_overhead"] and low["parameters"] < full["parameters"]


def test_keys_and_counts_of_the_u_vit(comfy, models):
    from benchmarks.sampling import run
    from benchmarks.support.step_speed import table

    said = []
    result = run("uvit", 8, 1, said.append, size=small_uvit(comfy))
    assert result.keys() == KEYS | PLAIN
    assert result["kv_projections"] == result["sites"] == 2
    # Two rows and new keys and values against one row: more than twice the operations of the branches.
    assert result["plain_counted_overhead"] > 2 * result["counted_overhead"] > 0
    assert "branches" in said[1] and "step, plain" in table(result)


def test_plain_way_is_the_same_step(comfy, models, tmp_path):
    from benchmarks.support.step_speed import Steps

    model = models.unidiffuser(small_uvit(comfy))
    sites = comfy.module("feedface_core.hosts.uvit").default_sites(model.model.diffusion_model)
    adapter = models.random_adapter(tmp_path, "unidiffuser", sites, 96, tap="output")
    face = models.encode(adapter, torch.rand(1, 224, 224, 3, generator=torch.Generator().manual_seed(0)))
    ours = models.apply(model, adapter, face, 0.8)
    plain = models.patch_plainly(model, models.branches_of(adapter), face.hidden, 0.8)
    off, ours, plain = (Steps(8).sample(variant, 1) for variant in (model, ours, plain))
    assert (ours - plain).norm() < 0.05 * (ours - off).norm()  # bfloat16


@pytest.mark.parametrize("host", ["sd", pytest.param("uvit", marks=pytest.mark.slow)])
def test_runs_in_a_process_of_its_own(newest_comfyui, host: str) -> None:
    """As ``run.py bench sampling`` starts it: nobody has imported ComfyUI before."""
    small = "TINY" if host == "sd" else "UViTConfig(width=96, heads=2, depth=6, hidden=384, grid=(4, 4))"
    program = f"""
from benchmarks.sampling import run
from benchmarks.support import comfy_models
from feedface_core.modules.uvit_config import UViTConfig
from tools.tiny_checkpoint import TINY
comfy_models.ENCODER = {{"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}}
print(sorted(run({host!r}, 8, 1, str, site_count=1, size={small})))
"""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "COMFYUI_PATH": str(newest_comfyui.path), "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "face_s" in done.stdout
