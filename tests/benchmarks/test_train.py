"""The figures of the training benchmark, and a short run of it."""

from __future__ import annotations

import json
import sys

import pytest
from support.small_training import run

from benchmarks.support.training_variants import VARIANTS
from benchmarks.train import summary

PROMISED = {
    "plain_sps",
    "uncached_sps",
    "cached_sps",
    "speedup",
    "plain_peak_mb",
    "cached_peak_mb",
    "memory_ratio",
    "step_over_bare",
    "frozen_pass",
    "shareable",
}


def rounds(*seconds, peak):
    return [{"seconds": one, "peak": peak} for one in seconds]


def test_summary():
    figures = summary(
        {
            "plain": rounds(4.0, 8.0, 4.0, peak=1000.0),
            "uncached": rounds(2.5, 2.5, 2.5, peak=700.0),
            "cached": rounds(1.1, 9.0, 1.5, peak=400.0),
            "bare": [{**one, "prefix": 0.1, "frozen pass": 0.25} for one in rounds(1.0, 9.0, 1.0, peak=390.0)],
        },
        samples=4,
    )
    assert figures.keys() >= PROMISED
    assert figures["plain_sps"] == 1.0 and figures["uncached_sps"] == 1.6
    assert figures["speedup"] == pytest.approx(4.0 / 1.5, rel=1e-3)
    assert figures["memory_ratio"] == 0.4
    assert figures["shareable"] == 0.1 and figures["frozen_pass"] == 0.25
    assert figures["step_over_bare"] == 1.1  # the middle of 1.1, 1.0 and 1.5, each of one round


@pytest.mark.slow
def test_short_run():
    result = run([sys.executable, "-m", "benchmarks.train", "--rounds", "2"], timeout=600)
    assert result.returncode == 0, result.stderr
    *table, last = result.stdout.splitlines()
    figures = json.loads(last)
    assert figures.keys() >= PROMISED
    assert all(any(line.startswith(name) for line in table) for name in VARIANTS)
    assert 0.0 < figures["shareable"] < figures["frozen_pass"] < 1.0
    assert figures["speedup"] > 1.5 and figures["memory_ratio"] < 0.7
