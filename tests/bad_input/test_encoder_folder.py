"""Folders of the frozen face encoder that are damaged."""

from __future__ import annotations

import json

import pytest
from support.refused import refused

from tools.tiny_diffusers import make_encoder
from trainer.config import EncoderSettings
from trainer.models.face_encoder import load_face_encoder

CONFIGS = {
    "empty": b"",
    "cut": b'{"model_type": "clip_vi',
    "list": b"[]",
    "null": b"null",
    "number": b"5",
    "text": b'"clip"',
    "nothing in it": b"{}",
    "UTF-16": '{"model_type": "clip_vision_model"}'.encode("utf-16"),
    "Latin-1": '{"model_type": "clip_vision_model", "é": 1}'.encode("latin-1"),
    "deep": b"[" * 100_000,
    "5000 digits": b'{"model_type": "clip_vision_model", "hidden_size": ' + b"9" * 5000 + b"}",
}
WRONG = ("x", None, [], 0, -1, 1.5, 10**7, 10**19)
VALUES = [
    *[("model_type", value) for value in (None, 5, [], "bert")],
    *[(name, value) for name in ("hidden_size", "num_attention_heads", "patch_size", "image_size") for value in WRONG],
    *[("num_hidden_layers", value) for value in WRONG],
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound folder."""
    folder = tmp_path_factory.mktemp("encoder") / "clip"
    make_encoder(folder, image_size=64)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A folder whose files may be damaged."""
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder):
    return load_face_encoder(EncoderSettings(path=str(folder), image_size=64))


def check(folder) -> None:
    refused(lambda: load(folder), "adapter.encoder", folder, error=ValueError)


def test_sound_folder_is_read(folder) -> None:
    assert load(folder).config.image_size == 64


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_config(folder, content) -> None:
    (folder / "config.json").write_bytes(content)
    check(folder)


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_value_of_the_config(folder, name, value) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, name: value}))
    check(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95", b"text", (2**60).to_bytes(8, "little")], ids=str)
def test_weights(folder, content) -> None:
    (folder / "model.safetensors").write_bytes(content)
    check(folder)
