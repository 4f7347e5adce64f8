"""Command lines with bad arguments, files and folders: an error on the standard error, before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import save_file

from trainer import cache, export, prepare, train

COMMANDS = {"train": train, "cache": cache, "prepare": prepare, "export": export}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """A configuration with a manifest of two photos, whose models must not be reached."""
    for name in ("a.png", "b.png"):
        Image.effect_noise((96, 80), 60).convert("RGB").save(tmp_path / name)
    rows = [{"path": name, "bbox": [10, 20, 50, 60]} for name in ("a.png", "b.png")]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"base": "base", "precision": "fp32"},
        "adapter": {"encoder": {"path": "clip"}},
        "data": {"manifest": "manifest.jsonl", "resolution": 64, "workers": 0, "cache": "cache"},
        "train": {"output": "run", "steps": 2, "batch_size": 2, "tracker": "none"},
    }
    (tmp_path / "good.yaml").write_text(json.dumps(values))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for module in ("trainer.models.adapter", "trainer.cache"):
        monkeypatch.setattr(f"{module}.load_frozen_model", lambda *_, **__: pytest.fail("began to load models"))
    yield tmp_path
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def refused(folder, capsys):
    """Runs a command that must be refused; what it says."""

    def run(command: str, arguments: list[str], *named: str) -> str:
        try:
            code = COMMANDS[command].main(arguments)
        except SystemExit as end:  # of argparse
            code = end.code
        except BaseException as caught:
            raise AssertionError(f"raised {type(caught).__name__}: {str(caught)[:300]}") from caught
        output = capsys.readouterr().err
        assert code in (1, 2), "accepted without a word"
        assert "error: " in output and "Traceback" not in output
        missing = [name for name in named if name not in output]
        assert not missing, f"does not name {missing}: {output[-400:]}"
        assert len(output[output.index("error: ") :]) < 1500, f"{len(output)} characters"
        return output

    return run


GOOD = ["good.yaml"]
LONG = "x" * 5000
ARGUMENTS = [
    *[(command, [], "") for command in COMMANDS],
    *[(command, ["a", *["b"] * (command == "prepare"), "--unknown"], "--unknown") for command in COMMANDS],
    *[(command, [path], "") for command in ("train", "cache") for path in ("gone.yaml", "folder", "a\0b.yaml", LONG,
    "", "~nobody-of-that-name/x.yaml", "manifest.jsonl", "a.png", "\udcff.yaml")],
    *[(command, [*GOOD, override], override.split("=")[0]) for command in ("train", "cache") for override in
      ("train.steps", "train.stepz=3", "train.steps=0", "train.seed=" + "9" * 31, "optimiser.betas=[1, 1]",
      "adapter.depth=1000000",
       "train.output=", "adapter.encoder.image_std=[0, 0, 0]", "validation.face_scale=.nan", "adapter.sites=[]",
       'train.output="a\\0b"',
       "validation.prompts=[]", "data.resolution=1000000", "data.manifest=[]")],
    *[(command, [*GOOD, f"data.manifest={path}"], path) for command in ("train", "cache") for path in ("gone.jsonl",
    "folder", "a.png", "file")],
    *[(command, [*GOOD, "data.root=gone"], "data.root") for command in ("train", "cache")],
    *[("train", [*GOOD, f"train.output={path}"], "train.output") for path in ("/proc/run", "file", "file/run",
    "/dev/null/run", "manifest.jsonl")],
    *[("cache", [*GOOD, f"data.cache={path}"], "data.cache") for path in ("null", "/proc/cache", "file",
    "file/cache", "/dev/null/cache", "")],
    ("train", [*GOOD, "data.cache=gone"], "data.cache"),
    ("train", [*GOOD, "data.cache=file"], "data.cache"),
    ("train", [*GOOD, "data.cache=null", "adapter.init=gone"], "adapter.init"),
    ("train", [*GOOD, "data.cache=null", "validation.references=[gone.png]"], "validation.references"),
    ("train", ["--config", "gone.yaml"], "gone.yaml"),
    ("train", ["train.steps=3"], "configuration"),
    ("train", [*GOOD, "other.yaml"], "other.yaml"),
    *[("prepare", [photos, "out"], "photos") for photos in ("gone", "", "a\0b", LONG, "~nobody-of-that-name/x",
    "file", "manifest.yaml")],
    *[("prepare", [".", output], "output") for output in ("file", "file/out", "/proc/out", "", "a\0b",
    "~nobody-of-that-name/x", "y" * 300)],
    ("prepare", [".", "out", "--config", "gone.yaml"], "gone.yaml"),
    ("prepare", [".", "out", "detect.device=abacus"], "detect.device"),
    ("prepare", [".", "out", "crop.size=100000"], "crop.size"),
    ("prepare", [".", "out", "photos=folder"], "photos"),
    ("prepare", [".", "out", "identity.pattern=(["], "identity.pattern"),
    ("prepare", [".", "out", "caption.model=folder"], "caption.model"),
    ("prepare", [".", "out", "mask.parser=facer", "mask.parser_roots=[folder]", "detect.detector=whole image"],
    "mask.parser"),
    *[("export", [path], "") for path in ("gone", "file", "folder", "a\0b", LONG, "~nobody-of-that-name/x", "")],
    ("export", ["folder", "--precision", "fp8"], "--precision"),
    ("export", ["folder", "--weights", "best"], "--weights"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "arguments", "named"), ARGUMENTS)
def test_arguments(refused, command, arguments, named) -> None:
    refused(command, arguments, named)


ROWS = [
    {"path": "a.png", "bbox": [500, 500, 600, 600]},
    {"path": "a.png", "bbox": [10, 20, 50, 60], "mask_path": 5},
    {"path": "a.png", "bbox": [10, 20, 50, 60], "crop_path": ["b.png"]},
    {"path": "a\0b.png", "bbox": [10, 20, 50, 60]},
    {"path": "x" * 5000, "bbox": [10, 20, 50, 60]},
    {"path": "~nobody-of-that-name/x.png", "bbox": [10, 20, 50, 60]},
    {"path": "\ud800.png", "bbox": [10, 20, 50, 60]},
    {"path": "a.png", "bbox": [0, 0, 1e15, 1e15]},
    {"path": "a.png", "bbox": [10, 20, 50, 60], "square_bbox": [-1e7, -1e7, 1e7, 1e7]},
    {"path": "a.png", "bbox": [10, 20, 50, 60], "caption": "\ud800"},
]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
@pytest.mark.parametrize("command", ["train", "cache"])
def test_manifest(folder, refused, command, row) -> None:
    with open(folder / "manifest.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    refused(command, GOOD, "manifest.jsonl, row 3")


@pytest.mark.parametrize("command", ["train", "cache"])
def test_crops_made_in_two_ways(folder, refused, command) -> None:
    with open(folder / "manifest.jsonl", "a") as file:
        file.write(json.dumps({"path": "a.png", "bbox": [10, 20, 50, 60], "crop_scale": 2}) + "\n")
    refused(command, GOOD, "2 ways")


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"path": "a.png", "id": "x", "bbox": [10, 20, 50, 60]},
            {"path": "b.png", "id": "x", "bbox": [10, 20, 50, 60]},
        ],
        [{"path": "a.png", "bbox": [0, 0, 1e15, 1e15]}],
        [{"path": "a.png", "mask_path": 5}],
        [{"path": "a.png", "caption": "\ud800"}],
        [{"path": 5}],
    ],
    ids=["id twice", "box", "mask", "caption", "path"],
)
def test_table_to_prepare(folder, refused, rows) -> None:
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused("prepare", ["table.jsonl", "out"], f"table.jsonl, row {len(rows)}")
    assert not (folder / "out").exists()


def test_run_that_cannot_be_locked(folder, refused) -> None:
    (folder / "run/run.lock").mkdir(parents=True)
    refused("train", [*GOOD, "data.cache=null"], "train.output run", "run.lock")


def test_export_to_where_nothing_can_be_written(folder, refused) -> None:
    save_file({"a": torch.zeros(1)}, folder / "folder/trainables.safetensors")
    (folder / "folder/manifest.json").write_text("{}")
    refused("export", ["folder", "-o", "/proc/adapter.safetensors"], "folder")
