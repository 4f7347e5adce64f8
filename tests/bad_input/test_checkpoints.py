"""Damaged checkpoints, at the door of the export: an error that names the checkpoint, never an adapter of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from feedface_core.config import AdapterConfig, EncoderConfig, SiteConfig
from feedface_core.modules.adapter import FaceAdapter
from trainer import export
from trainer.config import Config
from trainer.training.checkpoint import MANIFEST, STATE, _hash, save_checkpoint

NAN = float("nan")
VISION = {"hidden_size": 12, "patch_size": 112}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A whole checkpoint of a small adapter."""
    encoder = EncoderConfig(config=VISION, included=False)
    sites = (SiteConfig("input_blocks.1.1.transformer_blocks.0", 24, 3, 8),)
    described = AdapterConfig("sd1", sites, 16, encoder)
    tensors = {name: tensor.clone() for name, tensor in FaceAdapter(described).state_dict().items()}
    config = Config.load(
        model={"base": "base"},
        adapter={"encoder": {"path": "clip", "included": False}},
        data={"manifest": "manifest.jsonl"},
        train={"output": str(tmp_path / "run")},
    )
    state = {"step": 4, "samples": 8, "base": "f" * 16, "base_name": "base", "config": config.to_json()}
    state["adapter"] = described.to_json()
    return save_checkpoint(tmp_path / "run", {"trainables": tensors, "optimiser": {}, "ema": tensors}, state, 3)


def seal(folder: Path) -> None:
    """The manifest of the files as they are: the damage is the content's own."""
    entries = {
        path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(entries))


@pytest.fixture
def refused(checkpoint, capsys) -> Callable[[], str]:
    """The export of the checkpoint must be refused, in words that name it."""

    def run() -> str:
        try:
            code = export.main([str(checkpoint)])
        except BaseException as caught:
            raise AssertionError(f"raised {type(caught).__name__}: {str(caught)[:300]}") from caught
        text = capsys.readouterr().err
        assert code == 1, "accepted without a word"
        assert checkpoint.name in text, f"does not name the checkpoint: {text[:300]}"
        assert len(text) < 1500, f"{len(text)} characters"
        assert not list(checkpoint.parent.glob("*.safetensors")), "an adapter was left"
        return text

    return run


def test_whole_checkpoint_is_exported(checkpoint) -> None:
    assert export.main([str(checkpoint), "--weights", "raw"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        "5",
        "null",
        "[]",
        '{"state.json": 5}',
        '{"state.json": {}}',
        '{"state.json": null}',
        '{"gone": {}}',
    ]
    + [
        '{"../../etc/passwd": {"bytes": 1, "sha256": "a"}}',
        '{"state.json": {"bytes": "x", "sha256": 5}}',
        "[" * 100_000,
    ]
    + ['{"state.json": {"bytes": ' + "9" * 5000 + ', "sha256": "a"}}'],
)
def test_manifest(checkpoint, refused, text) -> None:
    (checkpoint / MANIFEST).write_text(text)
    refused()


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"5", b"null", b"[]", b"\xff\xfe\0", b"[" * 100_000], ids=str)
def test_state(checkpoint, refused, content) -> None:
    (checkpoint / STATE).write_bytes(content)
    seal(checkpoint)
    refused()


NUMBERS = ["x", None, [], 1.5, -1, NAN, True, 10**30]
TEXTS = [5, None, [], {}, "", "{", "[]", "null", "5", "[" * 100_000]
VALUES = {
    "format_version": ["x", None, [], 0, 99],
    "step": NUMBERS,
    "samples": NUMBERS,
    "base": [5, None, []],
    "config": [*TEXTS, "{}", '{"train": 5}'],
    "adapter": [*TEXTS, "{}", '{"host": "sd1"}'],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALUES.items() for value in values])
def test_value_of_the_state(checkpoint, refused, name, value) -> None:
    state = json.loads((checkpoint / STATE).read_text())
    (checkpoint / STATE).write_text(json.dumps({**state, name: value}))
    seal(checkpoint)
    refused()


@pytest.mark.parametrize("name", [*VALUES])
def test_state_without_a_part(checkpoint, refused, name) -> None:
    state = json.loads((checkpoint / STATE).read_text())
    del state[name]
    (checkpoint / STATE).write_text(json.dumps(state))
    seal(checkpoint)
    refused()


def change_one(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], Any]) -> dict[str, torch.Tensor]:
    name = next(iter(tensors))
    return {**tensors, name: change(tensors[name])}


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "none": lambda tensors: {},
    "one missing": lambda tensors: dict(list(tensors.items())[1:]),
    "one more": lambda tensors: {**tensors, "more": torch.ones(1)},
    "another shape": lambda tensors: change_one(tensors, lambda tensor: torch.ones(3, 5)),
    "no dimension": lambda tensors: change_one(tensors, lambda tensor: torch.tensor(1.0)),
    "NaN": lambda tensors: change_one(tensors, lambda tensor: tensor * NAN),
    "integers": lambda tensors: change_one(tensors, lambda tensor: tensor.long()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["trainables", "ema"])
def test_tensors(checkpoint, refused, file, damage) -> None:
    path = checkpoint / f"{file}.safetensors"
    save_file(damage(load_file(path)), path)
    seal(checkpoint)
    refused()


@pytest.mark.parametrize("name", ["trainables.safetensors", STATE])
@pytest.mark.parametrize("how", ["gone", "empty", "cut", "changed", "folder"])
def test_file(checkpoint, refused, name, how) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes({"empty": b"", "cut": content[:100], "changed": content[:-1] + b"#"}[how])
    refused()


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95", b"text", (2**60).to_bytes(8, "little")], ids=str)
def test_file_of_another_kind(checkpoint, refused, content) -> None:
    (checkpoint / "trainables.safetensors").write_bytes(content)
    seal(checkpoint)
    refused()
