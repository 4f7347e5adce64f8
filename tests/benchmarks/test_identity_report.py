"""What the identity benchmark says of its numbers: verdicts, findings, tables and plots."""

from __future__ import annotations

import pytest

from benchmarks.support.identity_findings import findings, verdicts
from benchmarks.support.identity_report import MEASURES, regions_table, write_report
from benchmarks.support.identity_rows import EQUAL


def _row(name: str, group: str = "main", point=(), **measures) -> dict:
    row = {"name": name, "group": group, "point": list(point), "parameters": 1_000_000, "gflop": 0.5}
    for measure in MEASURES:
        row[measure] = measures.get(measure, 0.5)
        row[f"{measure}_ci"] = [row[measure] - 0.05, row[measure] + 0.05]
    eyes = {"eyes": 0.7, "eyes_ci": [0.65, 0.75]}
    quality = {"attributes": {"expression": 0.4, "glasses": 0.9}, "frechet": 5.25, "copied": 0.1}
    return {"ceiling": 0.8, **eyes, **quality, **row}


def test_verdicts_say_what_did_not_come_out():
    rows = [
        _row("no face", top1=0.02, prompt=0.9),
        _row("1 reference", top1=0.15),
        _row("4 references", top1=0.18, prompt=0.7),
    ]
    said = verdicts({"chance": 0.01, "rows": rows, "differences": []})
    no, yes = "- **no**", "- yes"
    assert [line.split(":")[0] for line in said] == [no, yes, no, no, no, yes, no, yes]


def test_verdicts_name_the_attribute_that_the_face_costs_most():
    own, faced = {"expression": 0.6, "glasses": 0.9, "clothes_color": 0.8}, {"expression": 0.59, "glasses": 0.95}
    rows = [_row("no face") | {"attributes": own, "eyes": 0.85}, _row("4 references")]
    for color, verdict in ((0.785, "yes"), (0.77, "**no**")):
        rows[1]["attributes"] = faced | {"clothes_color": color}
        said = verdicts({"chance": 0.01, "rows": rows, "differences": []})
        assert "- yes: two sound eyes in 0.85 of the pictures: 0.850 [0.650, 0.750]" in said
        assert "- yes: the expression told 0.3 above chance, which is 0.25: 0.600" in said
        (line,) = (line for line in said if "no attribute" in line)
        assert line.startswith(f"- {verdict}: ") and line.endswith(f"clothes color 0.800 → {color:.3f}")


@pytest.mark.parametrize("share, confused, verdict", [(0.9, 0.05, "yes"), (0.89, 0.0, "**no**"), (1.0, 0.06, "**no**")])
def test_two_people_are_told_and_not_mixed_up(share, confused, verdict):
    regions = [{"adapter": "full", "people": count, "of_single": share, "confused": confused} for count in (1, 2, 4)]
    (said,) = verdicts({"chance": 0.01, "rows": [], "differences": [], "regions": regions})
    assert said.startswith(f"- {verdict}: two people in one picture (full)") and f"{confused:.3f}" in said


@pytest.mark.parametrize("low, verdict", [(-0.01, "- **no**"), (0.01, "- yes")])
def test_more_references_are_better_only_where_the_pairs_say_so(low, verdict):
    rows = [_row("1 reference", top1=0.5), _row("4 references", top1=0.6)]
    apart = _row("4 references − 1 reference", top1=0.1) | {"top1_ci": [low, 0.2]}
    said = verdicts({"chance": 0.01, "rows": rows, "differences": [apart]})
    assert said[-1].startswith(f"{verdict}: 4 references better than 1")


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


def test_findings_tell_of_the_strongest_identity_guidance():
    apart = [_row(f"4 references, identity guidance {pull} − 4 references", top1=pull) for pull in (0.02, 0.1)]
    (said,) = findings({"rows": [], "differences": apart})
    assert said.startswith("- identity guidance with scale 0.1: top-1 +0.100 [")


def test_the_report_holds_every_row_and_its_plots(tmp_path):
    rows = [_row("no face"), _row("1 reference", "references", (1,)), _row("4 references", "references", (4,))]
    rows += [_row(f"4 references{EQUAL}", "references", (4,))]
    nothing = {name: None for measure in ("similarity", "prompt", "background") for name in (measure, f"{measure}_ci")}
    nothing |= dict.fromkeys(("attributes", "eyes", "eyes_ci", "frechet", "copied"))
    rows += [_row("colour alone", "drawings") | nothing]
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
        "chain": [
            {"feature": "brows", "encoder": 0.9, "projection": 0.8, "picture": 0.2, "ceiling": 0.7, "chance": 0.1}
        ],
    }
    text = write_report(result, tmp_path).read_text()
    assert all(f"| {row['name']} |" in text for row in rows)
    assert "mask loss" in text and "names 0.750, and 0.500 once" in text
    assert "| brows | 0.900 | 0.800 | 0.200 | 0.700 | 0.100 |" in text
    assert "| colour alone | 0.500 [0.450, 0.550] | – | – | – |" in text
    assert "| 4 references | 0.500 | 0.800 | 0.625 | 0.700 [0.650, 0.750] | 5.250 | 0.100 |" in text
    assert "| 4 references − 1 reference | +0.500 [+0.450, +0.550] |" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"identity_references.png", "identity_scales.png"}
    assert all(f"({path.name})" in text for path in tmp_path.glob("*.png"))


def test_people_side_by_side_have_a_table_with_their_share_of_one_persons_rate():
    measured = {"similarity": 0.6, "prompt": 0.9, "confused": 0.02, "top1": 0.7}
    rows = [{"adapter": "full", "people": n, "pictures": 100 // n, "of_single": 1.0, **measured} for n in (1, 2)]
    for row in rows:
        row |= {f"{name}_ci": [row[name] - 0.01, row[name] + 0.01] for name in measured}
    rows[0]["alone"], rows[1]["alone"], rows[1]["alone_ci"] = None, 0.8, [0.75, 0.85]
    assert regions_table(rows)[-2].startswith("| full | 1 | 100 | 0.700 [0.690, 0.710] | 1.000 | – | 0.020")
    assert regions_table(rows)[-1] == (
        "| full | 2 | 50 | 0.700 [0.690, 0.710] | 1.000 | 0.800 [0.750, 0.850] | 0.020 [0.010, 0.030] | "
        "0.600 [0.590, 0.610] | 0.900 [0.890, 0.910] |"
    )
