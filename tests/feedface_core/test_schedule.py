"""Schedules of the strength: curves, texts, blocks, and what is refused."""

from __future__ import annotations

import pytest
import torch

from feedface_core.errors import FeedFaceError
from feedface_core.faces.preview import draw_schedule
from feedface_core.schedule import CURVES, Schedule, curve_points, parse_points, parse_sites

NAN = float("nan")


@pytest.mark.parametrize(
    ("curve", "values"),
    [
        ("constant", {0: 0.2, 0.5: 0.2, 1: 0.2}),
        ("linear", {0: 0.2, 0.25: 0.4, 1: 1.0}),
        ("ease", {0: 0.2, 0.25: 0.2 + 0.8 * 0.15625, 0.5: 0.6, 1: 1.0}),
        ("peak", {0: 0.2, 0.25: 0.6, 0.5: 1.0, 0.75: 0.6, 1: 0.2}),
    ],
)
def test_curves(curve, values):
    schedule = Schedule(curve_points(curve, 0.2, 1.0))
    assert {share: schedule.at(share) for share in values} == pytest.approx(values, abs=1e-9)
    assert schedule.varies == (curve != "constant")
    assert not Schedule(curve_points(curve, 0.5, 0.5)).varies


def test_points_hold_outside_and_may_jump():
    schedule = Schedule(parse_points(" 0.2: 0, 0.3:1, 0.6:1; 0.6:0.25,"))
    assert [schedule.at(share) for share in (0, 0.2, 0.25, 0.3, 0.59, 0.6, 1)] == pytest.approx(
        [0, 0, 0.5, 1, 1, 0.25, 0.25]
    )


def test_the_first_pattern_that_fits_a_block_decides():
    schedule = Schedule(sites=parse_sites("input_blocks.1.*: 0.5, in: 0.25, mid*: 0, *block?.0: 2"))
    names = {"input_blocks.1.1.transformer_blocks.0": 0.5, "input_blocks.10.1": 0.25, "in_blocks.3": 0.25}
    names |= {"middle_block.1": 0.0, "mid_block": 0.0, "output_blocks.0.1": 2.0, "output_blocks.3.1": 1.0}
    assert {name: schedule.of_site(name) for name in names} == names
    schedule.check_sites(names)
    with pytest.raises(FeedFaceError, match=r"no block of the adapter begins with 'mid\*'; it has out_blocks.0"):
        schedule.check_sites(["out_blocks.0", "input_blocks.1.1"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_points("0.5"), "points: found '0.5', expected pairs with a colon"),
        (lambda: parse_points("0:x"), "points: 'x' in '0:x' is not a number"),
        (lambda: parse_points("a:1"), "points: 'a' in 'a:1' is not a number"),
        (lambda: parse_points("0:nan"), "is not a number"),
        (lambda: parse_sites("in 0.5"), "sites: found 'in 0.5', expected pairs with a colon"),
        (lambda: Schedule(()), "points: found 0, expected 1 to 100"),
        (lambda: Schedule(((0.0, 1.0),) * 101), "points: found 101"),
        (lambda: Schedule(((0.5, 1.0), (0.4, 1.0))), "the share 0.4 after 0.5"),
        (lambda: Schedule(((1.5, 1.0),)), "the share 1.5 after 0"),
        (lambda: Schedule(((NAN, 1.0),)), "the share nan"),
        (lambda: Schedule(((0.0, NAN),)), "the factor at 0 is nan, expected 0 to 10"),
        (lambda: Schedule(((0.0, -1.0),)), "the factor at 0 is -1"),
        (lambda: Schedule(sites=(("", 1.0),)), "sites: a name is empty"),
        (lambda: Schedule(sites=(("in", 11.0),)), "the factor of 'in' is 11, expected 0 to 10"),
        (lambda: curve_points("wave", 0, 1), "curve is 'wave', expected one of constant"),
    ],
)
def test_what_is_no_schedule_is_refused(make, message):
    with pytest.raises(FeedFaceError, match=message):
        make()


@pytest.mark.parametrize("curve", CURVES)
def test_the_picture_shows_the_curve(curve):
    """In the column of each share the curve's colour is at the height of its factor."""
    schedule = Schedule(curve_points(curve, 0.25, 1.0), (("in", 0.5), ("mid", 0.0)))
    picture = draw_schedule(schedule)
    assert picture.shape == (288, 512, 3) and 0 <= picture.min() and picture.max() <= 1
    green = ((picture - torch.tensor([60, 220, 90]) / 255).abs().amax(-1) < 0.02)[:200]
    rows = [float(green[:, round(42 + share * 442)].nonzero().mean(dtype=torch.float32)) for share in (0.1, 0.5, 0.9)]
    heights = [schedule.at(share) for share in (0.1, 0.5, 0.9)]
    for (row, height), (other, factor) in zip(
        zip(rows, heights, strict=True), zip(rows[1:], heights[1:], strict=False), strict=False
    ):
        assert row - other == pytest.approx((factor - height) * 204, abs=12)
