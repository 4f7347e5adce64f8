"""Checkpoints: whole or not there, broken ones skipped, a full disk, two runs in one folder."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError
from support.small_training import run

from trainer.errors import TrainerError
from trainer.training import checkpoint
from trainer.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    run_lock,
    save_checkpoint,
)


def save(output, step, keep=3):
    files = {"trainables": {"a": torch.full((4,), float(step))}, "optimiser": {"step.a": torch.tensor(float(step))}}
    return save_checkpoint(output, files, {"step": step, "config": "{}"}, keep)


def test_round_trip(tmp_path):
    path = save(tmp_path, 7)
    assert path.name == "checkpoint-00000007" and (tmp_path / "latest").read_text() == "checkpoint-00000007\n"
    found = load_latest(tmp_path)
    assert found.step == 7 and found.state["config"] == "{}"
    assert found.tensors["trainables"]["a"].tolist() == [7.0] * 4
    assert found.tensors["optimiser"]["step.a"].shape == ()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_newest_are_kept(tmp_path):
    for step in (2, 10, 4, 6):
        save(tmp_path, step, keep=2)
    assert [path.name[-2:] for path in list_checkpoints(tmp_path)] == ["10", "06"]


def test_empty_folder(tmp_path):
    assert load_latest(tmp_path) is None and load_latest(tmp_path / "none") is None


def truncate(path):
    file = path / "trainables.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(path):
    file = path / "trainables.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage, told",
    [
        (truncate, "bytes, expected"),
        (flip_a_bit, "its hash differs"),
        (lambda path: (path / "optimiser.safetensors").unlink(), "No such file"),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "manifest.json").unlink(), "cannot be read"),
    ],
)
def test_broken_one_is_skipped_with_a_warning(tmp_path, caplog, damage, told):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    with caplog.at_level(logging.WARNING):
        found = load_latest(tmp_path)
    assert found.step == 1
    assert "skipping a broken checkpoint" in caplog.text and told in caplog.text
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "checkpoint-00000002")
    save(tmp_path, 2)  # passed again
    assert load_latest(tmp_path).step == 2


def test_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"the disk is full.*Last good checkpoint: checkpoint-00000001"):
        save(tmp_path, 2)
    assert load_latest(tmp_path).step == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_disk_that_fills_up_while_writing(tmp_path, monkeypatch, error):
    save(tmp_path, 1)
    written = checkpoint.save_file

    def fill(tensors, path):
        if "optimiser" in str(path):
            raise error
        written(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", fill)
    with pytest.raises(CheckpointError, match="the disk is full: .*No space left.*train.keep"):
        save(tmp_path, 2)
    assert load_latest(tmp_path).step == 1
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output")))
    with pytest.raises(CheckpointError, match="Input/output") as caught:
        save(tmp_path, 2)
    assert "full" not in str(caught.value) and "Last good checkpoint: none" in str(caught.value)


def test_second_run_is_kept_out(tmp_path):
    (tmp_path / ".writing-checkpoint-00000009").mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from trainer.training.checkpoint import run_lock; "
        "run_lock(Path(sys.argv[1])).__enter__()"
    )
    with run_lock(tmp_path):
        assert not (tmp_path / ".writing-checkpoint-00000009").exists(), "what a killed run left is swept away"
        other = run([sys.executable, "-c", code, str(tmp_path)])
        assert other.returncode == 1
        assert f"TrainerError: {tmp_path} is in use by process {os.getpid()}" in other.stderr
        with pytest.raises(TrainerError, match="is in use by"), run_lock(tmp_path):
            pass
    assert run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0
