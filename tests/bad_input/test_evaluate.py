"""Bad input to trainer.evaluate: a clear error before a picture is drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.evaluation import make_small

from trainer.evaluate import __main__ as command


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_small(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture
def refused(small, tmp_path, monkeypatch, capsys):
    """Runs the command, which must be refused before it draws; what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.evaluate.drawing.sample", lambda *_, **__: pytest.fail("began to draw"))
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "a.png")
    people = {"people": [{"id": "ann", "photos": ["a.png"]}], "prompts": ["a person"]}
    (tmp_path / "people.json").write_text(json.dumps(people), encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()

    def run(arguments: list[str], *named: str) -> str:
        usual = {
            "adapter": small.adapter,
            "model.base": small.base,
            "model.precision": "fp32",
            "detect.detector": "whole image",
            "recogniser": "encoder",
        }
        given = {one.partition("=")[0] for one in arguments if "=" in one}
        places = [one for one in arguments if "=" not in one and not one.startswith("--")]
        rest = [f"{name}={value}" for name, value in usual.items() if name not in given]
        arguments = [*(places or ["people.json", "out"]), *(one for one in arguments if one not in places), *rest]
        try:
            code = command.main([one for one in arguments if not one.endswith("=DROP")])
        except SystemExit as end:  # of argparse
            code = end.code
        said = capsys.readouterr().err
        assert code in (1, 2), "accepted without a word"
        assert "error: " in said and "Traceback" not in said
        assert not [name for name in named if name not in said], said[-600:]
        assert len(said[said.index("error: ") :]) < 1500
        return said

    return run


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["adapter=DROP"], ["nothing to evaluate", "adapter and model.base"]),
        (["model.base=DROP"], ["nothing to evaluate"]),
        (["adapter=gone.safetensors"], ["gone.safetensors"]),
        (["adapter=folder"], ["folder", "no checkpoint"]),
        (["adapter=a.png"], ["a.png"]),
        (["adapter="], ["nothing to evaluate"]),
        (["model.base=gone"], ["model.base", "gone"]),
        (["model.base=folder"], ["unet"]),
        (["people.json", "file"], ["output file"]),
        (["people.json", "file/below"], ["output"]),
        (["gone.json", "out"], ["gone.json"]),
        (["folder", "out"], ["folder", "photos"]),
        (["a.png", "out"], ["a.png"]),
        (["--photos=gone"], ["a.png", "gone"]),
        (["--pictures=gone"], ["pictures gone: no such folder"]),
        (["--pictures=folder"], ["1 of 1 pictures are missing", "ann_01"]),
        (["--pictures=folder", "missing=skip"], ["1 of 1 pictures are missing"]),
        (["--pictures=file"], ["no such folder"]),
        (["unmodified_pictures=folder"], ["unmodified_pictures", "ann_01"]),
        (["prompts=gone.txt"], ["gone.txt"]),
        (["prompts=folder"], ["folder"]),
        (["clip=folder"], ["clip folder", "config.json"]),
        (["image_reward=folder"], ["ImageReward.pt"]),
        (["encoder=folder", "recogniser=nobody"], ["recogniser", "nobody"]),
        (["detect.detector=nobody"], ["detect.detector"]),
        (["recogniser=insightface", "detect.insightface_roots=[folder]"], ["InsightFace", "folder"]),
        (["most_people=0"], ["most_people"]),
        (["seeds=[]"], ["seeds"]),
        (["sampling.steps=0"], ["sampling.steps"]),
        (["sampling.text_scale=.nan"], ["text_scale"]),
        (["samplng.steps=3"], ["samplng", "sampling"]),
        (["device=quantum"], ["device"]),
        (["people.json"], ["OUTPUT"]),
        (["--unknown"], ["--unknown"]),
        (["--config=gone.yaml"], ["gone.yaml"]),
    ],
)
def test_arguments(refused, arguments, named):
    refused(arguments, *named)


def test_adapter_for_another_model(refused, tmp_path, small):
    from support.small_training import make_models

    make_models(tmp_path / "other", "sdxl")
    refused([f"model.base={tmp_path / 'other' / 'base'}"], "face.safetensors", "does not fit", "site")


def test_adapter_without_its_encoder(refused, tmp_path, small):
    from feedface_core.files.adapter_file import load_adapter, save_adapter

    found = load_adapter(small.adapter)
    save_adapter(tmp_path / "bare.safetensors", found.config, found.tensors)
    refused(["adapter=bare.safetensors"], "does not include its face encoder", "encoder")
    refused(["adapter=bare.safetensors", "encoder=folder"], "adapter.encoder.path", "folder")


def test_no_face_in_the_references(refused, tmp_path):
    pytest.importorskip("facenet_pytorch")
    refused(["detect.detector=mtcnn"], "ann: no face in any of the 1 photos", "a.png", "mtcnn")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 20, "cut"])
def test_photos_and_pictures_that_cannot_be_read(refused, tmp_path, content):
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "folder" / "ann_01.png").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    refused(["--pictures=folder"], "ann_01.png")
    shutil.copy(tmp_path / "folder" / "ann_01.png", tmp_path / "a.png")
    refused([], "a.png")


@pytest.mark.parametrize(
    "summary",
    [b"", b"{", b"[]", b"{}", b'{"jobs": 3}', b'{"jobs": [{"id": 7}]}', b'{"jobs": [], "jobs": []}', b"\xff"]
    + [b'{"jobs": [{"id": "x", "person": "ann", "prompt": "a person", "files": ["../../a.png"]}]}'],
)
def test_summaries_of_the_queue(refused, tmp_path, summary):
    (tmp_path / "folder" / "summary.json").write_bytes(summary)
    refused(["--pictures=folder"], "folder")


@pytest.mark.parametrize(
    "memo", [b"\xff\xfe\n", b'{"key": 3}\n', b'{"key": "x"', b"[" * 5000, b'{"key": "0", "box": 7}\n']
)
def test_damaged_memo_is_done_without(refused, tmp_path, memo, small, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "memo.jsonl").write_bytes(memo)
    shutil.copy(tmp_path / "a.png", tmp_path / "folder" / "ann_01.png")
    values = ["recogniser=encoder", f"adapter={small.adapter}", "detect.detector=whole image"]
    folder = [str(tmp_path / name) for name in ("people.json", "out")]
    assert command.main([*folder, *values, f"--pictures={tmp_path / 'folder'}"]) == 0


def test_tensors_that_are_no_adapter(refused, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused(["adapter=other.safetensors"], "other.safetensors", "not a FeedFace adapter")
    assert not list(Path("out").glob("pictures/*"))
