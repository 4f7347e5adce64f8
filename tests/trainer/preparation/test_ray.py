"""On Ray the same stages give the same manifest, and a worker that is killed costs its batch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.preparation import BOX, DiesOnce, make_photo, run, write_table

from trainer.errors import TrainerError
from trainer.preparation import on_ray
from trainer.preparation.photo import Photo


@pytest.mark.slow
def test_killed_worker_costs_its_batch(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    tests = Path(__file__).resolve().parents[2]  # where Ray's workers find these stages
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent)]))
    batches = [[Photo(str(number), Path("x"))] for number in range(6)]
    done = [photo for batch in on_ray.work(DiesOnce, (str(tmp_path),), batches, 1, 0) for photo in batch]
    assert sorted(photo.id for photo in done) == list("012345") and all(photo.row["seen"] for photo in done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0", "1-0", "2-0", "3-0", "3-1", "4-0", "5-0"]


@pytest.mark.slow
def test_manifest_is_the_same_byte_for_byte(tmp_path):
    pytest.importorskip("ray")
    rows = [{"path": str(make_photo(tmp_path / f"{number}.png", number)), "bbox": BOX} for number in range(7)]
    table = write_table(tmp_path / "table.jsonl", rows)
    run(table, tmp_path / "here", "batch_size=2")
    run(table, tmp_path / "there", "batch_size=2", "runner=ray", "workers=2")
    for name in ("manifest.jsonl", "dropped.jsonl", "summary.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    assert len((tmp_path / "here/manifest.jsonl").read_text().splitlines()) == 7


def test_without_ray_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TrainerError, match=r"runner=ray needs Ray Data: pip install 'feedface\[ray\]'"):
        next(on_ray.work(DiesOnce, ("x",), [[]], 1, 0))
