"""Names of files that come to a load node from anywhere, and face encoders that are none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.refused import refused
from support.unidiffuser import GOLDEN

NAMES: dict[str, Any] = {
    "outside": "../outside.safetensors",
    "outside from below": "sub/../../outside.safetensors",
    "outside by another sign": "..\\outside.safetensors",
    "absolute": "/etc/passwd",
    "folder": "sub",
    "hidden by its extension": "notes.txt",
    "not there": "gone.safetensors",
    "NUL": "good\0.safetensors",
    "surrogate": "good\ud800.safetensors",
    "newline": "good.safetensors\n",
    "letter case": "GOOD.safetensors",
    "address": "https://example.com/good.safetensors",
    "home": "~/good.safetensors",
    "empty": "",
    "here": ".",
    "above": "..",
    "long": "n" * 5000,
    "deep": "n/" * 2000 + "n.safetensors",
    "none": None,
    "number": 5,
    "NaN": float("nan"),
    "true": True,
    "list": ["good.safetensors"],
    "object": {"name": "good.safetensors"},
}


@pytest.fixture
def folder(pack, comfy, adapter, face, tmp_path, monkeypatch) -> Path:
    """Model folders with one good file each, and a file beside the folders."""
    import folder_paths

    kinds = ("feedface", "feedface_faces", "clip_vision", "diffusion_models", "text_encoders")
    for kind in kinds:
        path = tmp_path / kind
        (path / "sub").mkdir(parents=True)
        (path / "notes.txt").touch()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    shutil.copy(adapter.path, tmp_path / "outside.safetensors")
    shutil.copy(adapter.path, tmp_path / "feedface/good.safetensors")
    comfy.module("feedface_core.files.face_file").save_face(tmp_path / "feedface_faces/good.safetensors", face)
    for kind, name in (("diffusion_models", "uvit"), ("text_encoders", "caption_decoder")):
        save_file(torch.load(GOLDEN / f"{name}.pth", weights_only=True), tmp_path / kind / "good.safetensors")
    shutil.copy(GOLDEN / "config.json", tmp_path / "diffusion_models")
    found = pack.format.load_adapter(adapter.path)
    pack.format.save_adapter(tmp_path / "feedface/bare.safetensors", found.config, found.tensors)
    weights = {f"vision_model.{name}": tensor for name, tensor in found.encoder_tensors.items()}
    save_file(weights, tmp_path / "clip_vision/good.safetensors")
    return tmp_path


GOOD = {
    "load.LoadAdapter": {"adapter_name": "bare.safetensors", "face_encoder": "good.safetensors"},
    "encode.LoadFace": {"face_name": "good.safetensors"},
    "unidiffuser.load.LoadUniDiffuser": {"uvit": "good.safetensors", "caption_decoder": "good.safetensors"},
}


def node_of(comfy, path: str):
    module, _, name = path.rpartition(".")
    return getattr(comfy.module(f"nodes.{module}"), name)


@pytest.mark.parametrize("path", GOOD)
def test_good_names(comfy, folder, path: str) -> None:
    node_of(comfy, path).execute(**GOOD[path])


@pytest.mark.parametrize("value", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in GOOD.items() for name in names])
def test_bad_name(comfy, folder, path: str, name: str, value: Any) -> None:
    node, error = node_of(comfy, path), comfy.module("feedface_core.errors").FeedFaceError
    refused(lambda: node.execute(**{**GOOD[path], name: value}), error=error)
    assert str(folder / "outside") not in str(node.fingerprint_inputs(**{**GOOD[path], name: value}))


@pytest.mark.parametrize("value", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("path", GOOD)
def test_bad_name_before_the_run(comfy, folder, path: str, value: Any) -> None:
    answer = node_of(comfy, path).validate_inputs(value)
    assert isinstance(answer, str) and str(folder) in answer and len(answer) < 1500


@pytest.mark.parametrize("value", ["fp64", "", None, 3, ["fp32"], torch.float32])
def test_bad_type_of_weights(comfy, folder, value: Any) -> None:
    path = "unidiffuser.load.LoadUniDiffuser"
    node, error = node_of(comfy, path), comfy.module("feedface_core.errors").FeedFaceError
    refused(
        lambda: node.execute(**GOOD[path], weight_dtype=value), "FeedFace Load UniDiffuser", "weight_dtype", error=error
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_face_encoder(comfy, pack, folder, share: float, suffix: str) -> None:
    good = folder / "clip_vision/good.safetensors"
    if suffix == ".pt":
        good = folder / "clip_vision/whole.pt"
        torch.save({"vision_model.embeddings.class_embedding": torch.zeros(48)}, good)
    broken = folder / f"clip_vision/broken{suffix}"
    broken.write_bytes(good.read_bytes()[: int(good.stat().st_size * share)])
    error = comfy.module("feedface_core.errors").FeedFaceError
    refused(lambda: pack.loaders.LoadAdapter.execute("bare.safetensors", broken.name), broken, error=error)


NAN = float("nan")
ENCODERS = {
    "missing": {},
    "NaN": {"post_layernorm.weight": torch.full((48,), NAN)},
    "int64": {"post_layernorm.weight": torch.ones(48, dtype=torch.int64)},
    "bool": {"embeddings.class_embedding": torch.ones(48, dtype=torch.bool)},
    "misshaped": {"embeddings.class_embedding": torch.zeros(49)},
    "no dimension": {"embeddings.class_embedding": torch.tensor(1.0)},
    "surplus": {"surplus": torch.zeros(1)},
}


@pytest.mark.parametrize("changes", ENCODERS.values(), ids=ENCODERS)
def test_broken_face_encoder(comfy, pack, folder, adapter, changes: dict) -> None:
    weights = {**pack.format.load_adapter(adapter.path).encoder_tensors, **changes}
    if not changes:
        weights.pop("encoder.layers.1.mlp.fc2.bias")
    broken = folder / "clip_vision/broken.safetensors"
    save_file({f"vision_model.{name}": tensor for name, tensor in weights.items()}, broken)
    error = comfy.module("feedface_core.errors").FeedFaceError
    refused(lambda: pack.loaders.LoadAdapter.execute("bare.safetensors", broken.name), broken, error=error)
