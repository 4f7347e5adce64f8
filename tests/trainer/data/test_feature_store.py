"""Hashes of files, and shards."""

from __future__ import annotations

import pytest
import torch

from trainer.data.feature_store import FeatureStore, FileHashes
from trainer.errors import TrainerError


def test_hashes_are_read_once_and_follow_the_contents(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    hashes = FileHashes(tmp_path / "files.json")
    first = hashes.of(file)
    hashes.save()
    again = FileHashes(tmp_path / "files.json")
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: pytest.fail("read again"))
    assert again.of(file) == first
    monkeypatch.undo()
    file.write_bytes(b"two!")
    assert again.of(file) != first
    (tmp_path / "files.json").write_text('{"a": [')
    assert FileHashes(tmp_path / "files.json").of(file) == again.of(file)
    with pytest.raises(TrainerError, match="gone: cannot be read"):
        hashes.of(tmp_path / "gone")


def test_shard_of_another_format_is_ignored(tmp_path, caplog):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "face-1.safetensors", metadata={"format": "other"})
    assert FeatureStore(tmp_path, "face", {}, {0: "a"}).missing() == {"a": 0}
    assert "of another format" in caplog.text
