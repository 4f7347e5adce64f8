"""A photograph, MTCNN and dlib: the same photo elsewhere is recognised as pasted, another face is none."""

from __future__ import annotations

import importlib.util
import json

import pytest
from PIL import Image, ImageOps

from trainer.config import EvaluateSettings
from trainer.evaluate.__main__ import evaluate


@pytest.mark.slow
def test_pasted_photograph_is_told(tmp_path):
    data = pytest.importorskip("skimage.data")
    for package in ("dlib", "face_recognition_models", "facenet_pytorch"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no package {package}")
    photo = Image.fromarray(data.astronaut())
    photo.save(tmp_path / "1.png")
    ImageOps.mirror(photo.crop((60, 0, 400, 340))).save(tmp_path / "2.jpg", quality=60)
    photo.crop((20, 0, 420, 400)).resize((300, 300)).convert("L").rotate(8).save(tmp_path / "3.png")
    people = {"people": [{"id": "eileen", "photos": ["1.png", "2.jpg", "3.png"]}], "prompts": ["in orange", "nobody"]}
    (tmp_path / "people.json").write_text(json.dumps(people), encoding="utf-8")
    (tmp_path / "made").mkdir()
    photo.crop((0, 0, 460, 460)).save(tmp_path / "made" / "eileen_01.jpg", quality=92)
    Image.effect_noise((256, 256), 40).convert("RGB").save(tmp_path / "made" / "eileen_02.png")
    values = {
        "people": str(tmp_path / "people.json"),
        "output": str(tmp_path / "out"),
        "pictures": str(tmp_path / "made"),
    }
    results = evaluate(EvaluateSettings.load(None, ["recogniser=dlib", "detect.detector=mtcnn"], **values))
    face = results["rows"]["face"]
    assert face["found"]["value"] == 0.5
    assert face["copied"]["value"] == 1.0 and face["beyond"]["value"] > 0.05
    assert results["recogniser"] == "dlib" and "mtcnn" in results["detector"]
