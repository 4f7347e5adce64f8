"""What ``python run.py comfyui`` and ``demo`` do before and around the server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from tools import comfyui, demo


def test_people_lie_in_the_input_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people = tmp_path / "pack/models/feedface_small/people"
    people.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(people / "feedface_person1_1.png")
    (people / "people.json").write_text("[]")
    monkeypatch.setattr(comfyui, "ROOT", tmp_path / "pack")
    for _ in range(2):  # started again, it finds them there
        comfyui.lay_out_people(tmp_path / "base/input")
    assert [path.name for path in (tmp_path / "base/input").iterdir()] == ["feedface_person1_1.png"]


def test_a_photograph_without_a_model_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for arguments, said in (
        (["--photo", "me.jpg"], "needs a model: give --checkpoint and --adapter"),
        (["--checkpoint", str(tmp_path / "absent.safetensors"), "--adapter", "a"], "there is no file .*absent"),
    ):
        monkeypatch.setattr(sys, "argv", ["demo", *arguments])
        with pytest.raises(SystemExit, match=said):
            demo.main()
