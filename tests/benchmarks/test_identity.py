"""The identity benchmark: its counting, its intervals, its report. The scores themselves need the trained system."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.identity import all_rows, branch_gflop, tokens_at, without_face
from benchmarks.support.identity_report import MEASURES, findings, verdicts, write_report
from examples.small_model.evaluate import bootstrap, requests
from feedface_core.config import SiteConfig
from feedface_core.guidance import Guidance, joint, text_then_face


def _row(name: str, group: str = "main", point=(), **measures) -> dict:
    row = {"name": name, "group": group, "point": list(point), "parameters": 1_000_000, "gflop": 0.5}
    for measure in MEASURES:
        row[measure] = measures.get(measure, 0.5)
        row[f"{measure}_ci"] = [row[measure] - 0.05, row[measure] + 0.05]
    return row


def test_operations_of_a_branch_agree_with_pytorchs_own_count():
    from torch.utils.flop_counter import FlopCounterMode

    from feedface_core.modules.branch import ControlBranch

    def attend(q, k, v, heads, mask=None):  # in matrix products, which the counter counts on every device
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    site = SiteConfig("input_blocks.1.1.transformer_blocks.0", 128, 4, 32)
    encoder = SimpleNamespace(tokens=37)
    for self_attention in (True, False):
        branch = ControlBranch(128, 128, 4, 32, 1, self_attention, attention=attend)
        kv = branch.project_face(torch.randn(1, 2 * 37, 128))
        with FlopCounterMode(display=False) as counter:
            branch(torch.randn(1, 64, 128), kv)
        config = SimpleNamespace(sites=(site,), self_attention=self_attention, encoder=encoder)
        counted = branch_gflop(SimpleNamespace(config=config), references=2)
        assert counted == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-6)


def test_tokens_of_the_sites_are_those_of_the_u_net():
    from examples.small_model.denoiser import create
    from feedface_core.hosts import sd_unet

    unet = create()
    sites = {site.path: site.name for site in sd_unet.list_sites(unet)}
    seen = {}
    for path, module in unet.named_modules():
        if path in sites:
            module.register_forward_hook(lambda m, i, o, name=sites[path]: seen.__setitem__(name, i[0].shape[1]))
    with torch.no_grad():
        unet(torch.randn(1, 16, 8, 8), 10, torch.randn(1, 32, 128))
    assert len(seen) == 7
    assert seen == {name: tokens_at(name) for name in seen}


def test_sites_of_the_variants_exist():
    from examples.small_model.build import SITES
    from examples.small_model.denoiser import create
    from feedface_core.hosts import sd_unet

    assert [site.name for site in sd_unet.list_sites(create())] == SITES


def test_intervals_draw_people_and_not_pictures():
    persons = np.repeat(np.arange(50), 4)
    values = np.repeat((np.arange(50) < 20).astype(float), 4)  # 20 of 50 people are always told right
    low, high = bootstrap(values, persons)
    # the standard error over people is sqrt(0.4 * 0.6 / 50) = 0.069; over 200 pictures it would be 0.035
    assert low == pytest.approx(0.4 - 1.96 * 0.069, abs=0.02)
    assert high == pytest.approx(0.4 + 1.96 * 0.069, abs=0.02)


def test_guidance_without_a_face_computes_nothing_twice():
    assert without_face(joint(2.0)) == without_face(text_then_face(3.0, 7.0)) == Guidance(-2.0, 3.0, 0.0, 0.0)
    assert without_face(text_then_face(1.0, 5.0)).needed == ("text",)


def test_requests_do_not_depend_on_how_many_people_take_part():
    assert requests(3, 2) == requests(9, 2)[:6]
    assert len({request.seed for request in requests(100, 4)}) == 400


def test_rows_cover_the_comparisons_and_have_one_name_each():
    rows = list(all_rows(quick=False))
    assert len({row.name for row in rows}) == len(rows)
    assert {row.group for row in rows} == {
        "main",
        "references",
        "crops",
        "losses",
        "retrieval",
        "branches",
        "training",
        "scales",
    }
    assert [row.name for row in all_rows(quick=True)] == ["no face", "1 reference", "2 references", "4 references"]


def test_verdicts_say_what_did_not_come_out():
    rows = [
        _row("no face", top1=0.02, prompt=0.9),
        _row("1 reference", top1=0.15),
        _row("4 references", top1=0.18, prompt=0.7),
    ]
    said = verdicts({"chance": 0.01, "rows": rows, "differences": []})
    assert [line.split(":")[0] for line in said] == ["- **no**", "- yes", "- **no**", "- yes"]


def test_findings_name_the_cheapest_branch_that_is_as_good():
    rows = [
        _row("full branches", "branches", top1=0.70),
        {**_row("no self-attention", "branches", top1=0.66), "gflop": 0.4},
        {**_row("one a resolution", "branches", top1=0.5), "gflop": 0.1, "parameters": 100_000},
    ]
    apart = [
        _row("retrieval − no retrieval", top1=-0.1),
        _row("no self-attention − full branches", top1=-0.04),
        _row("one a resolution − full branches", top1=-0.2),
    ]
    retrieval, cheapest = findings({"rows": rows, "differences": apart})
    assert "top-1 -0.100 [-0.150, -0.050]" in retrieval
    assert "no self-attention, 80% of the operations and 100% of the parameters" in cheapest
    apart[1]["top1_ci"] = [-0.09, -0.01]
    assert "none is cheaper" in findings({"rows": rows, "differences": apart})[1]


def test_the_report_holds_every_row_and_its_plots(tmp_path):
    rows = [_row("no face"), _row("1 reference", "references", (1,)), _row("4 references", "references", (4,))]
    rows += [_row(f"text {t}, face {f}", "scales", (t, f)) for t in (1, 2) for f in (1, 2)]
    result = {
        "chance": 0.01,
        "identities": 100,
        "prompts": 4,
        "steps": 16,
        "seconds": 9,
        "absent": ["mask loss"],
        "rows": rows,
        "differences": [_row("4 references − 1 reference")],
        "ceiling": {"drawn": 0.75, "decoded": 0.5},
    }
    text = write_report(result, tmp_path).read_text()
    assert all(f"| {row['name']} |" in text for row in rows)
    assert "mask loss" in text and "names 0.750, and 0.500 once" in text
    assert "| 4 references − 1 reference | +0.500 [+0.450, +0.550] |" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"identity_references.png", "identity_scales.png"}
    assert all(f"({path.name})" in text for path in tmp_path.glob("*.png"))
