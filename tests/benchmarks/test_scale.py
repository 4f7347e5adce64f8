"""The figures of the scale benchmark, and a short run of it."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
from support.small_training import run

from benchmarks import scale
from benchmarks.support import scale_probes
from benchmarks.train import make_photos
from trainer.data.manifest import read_manifest


def test_manifest_is_one_that_can_be_trained_on(tmp_path):
    make_photos(tmp_path / "photos", scale.PHOTOS)
    records, dropped = read_manifest(scale.make_manifest(tmp_path / "photos", 480))
    assert len(records) == 480 and not dropped
    assert set(Counter(record.identity for record in records).values()) == {scale.PERSON}


def test_speed_leaves_the_first_steps_out(tmp_path):
    speeds = [0.1] * scale.WARM_UP + [2.0, 9.0, 3.0]
    lines = (json.dumps({"step": step, "samples per second": value}) for step, value in enumerate(speeds))
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert scale.speed(tmp_path) == 3.0
    assert scale.medians([{"a": 1.0}, {"a": 5.0}, {"a": 2.0}]) == {"a": 2.0}


def test_shards_of_the_real_sizes_can_be_read(tmp_path):
    found = scale_probes.shards(str(tmp_path), 2, 3)
    assert 500 < found["shard_kb_a_photo"] < 800 and found["shard_samples_per_s"] > 0


@pytest.mark.slow
def test_quick_run():
    done = run([sys.executable, "-m", "benchmarks.scale", "--quick", "--rounds", "1", "--rows", "100", "1000"], 1200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["two_process_efficiency"] > 0 and found["checkpoint_s"] > 0
    for rows in ("100", "1000"):
        assert {"startup_s", "memory_mb", "first_batch_s", "rows_ms", "index_s"} <= found["rows"][rows].keys()
