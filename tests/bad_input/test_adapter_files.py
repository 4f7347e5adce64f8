"""Adapter files that are broken in one place each: config, weights, and the file itself."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.refused import BROKEN_WEIGHTS, refused

from feedface_core.config import AdapterConfig, EncoderConfig, SiteConfig
from feedface_core.files.adapter_file import load_adapter, save_adapter
from feedface_core.modules.adapter import FaceAdapter
from feedface_core.modules.encoder import build_encoder

VISION = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 112,
}
NAN, INF = float("nan"), float("inf")


class File:
    """A good adapter file, to be broken."""

    def __init__(self, folder: Path):
        encoder = EncoderConfig(config=VISION)
        sites = tuple(SiteConfig(f"input_blocks.{i}.1.transformer_blocks.0", 24, 3, 8) for i in (1, 2))
        config = AdapterConfig("sd1", sites, 16, encoder, title="Good")
        path = save_adapter(
            folder / "good.safetensors", config, FaceAdapter(config).state_dict(), build_encoder(encoder).state_dict()
        )
        self.path = folder / "broken.safetensors"
        self.tensors = load_file(path)
        self.metadata = dict(load_adapter(path).metadata)
        self.config = json.loads(self.metadata["config"])

    def write(self) -> Path:
        save_file(self.tensors, self.path, self.metadata)
        return self.path

    def write_config(self) -> Path:
        self.metadata["config"] = json.dumps(self.config)
        return self.write()


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path)


def put(tree: Any, key: str, value: Any) -> None:
    """Sets a value deep inside lists and dicts, by its dotted key."""
    *path, last = (int(word) if word.isdigit() else word for word in key.split("."))
    for word in path:
        tree = tree[word]
    tree[last] = value


WHOLE = ["text", None, [], {}, 2.5, NAN, -1, 0, 10**19]
NUMBER = ["text", None, [], {}, NAN, INF, -INF, -1]
CHOICE = ["other", "", None, 1, ["off"]]
CONFIG = [
    *[(key, value) for key in ("context_width", "depth", "max_references") for value in WHOLE],
    *[(f"sites.0.{key}", value) for key in ("width", "heads", "head_dim") for value in WHOLE],
    *[("encoder.image_size", value) for value in WHOLE],
    *[(f"encoder.config.{key}", value) for key in VISION for value in WHOLE],
    *[("strength", value) for value in NUMBER],
    *[(f"encoder.{key}", value) for key in ("crop_scale", "crop_fill") for value in NUMBER],
    *[(key, value) for key in ("host", "tap", "null", "combination", "prediction") for value in CHOICE],
    *[(f"encoder.{key}", value) for key in ("type", "crop_border") for value in CHOICE],
    *[("encoder.layer", value) for value in ("two", None, 1.5, 99, -99, 10**19)],
    *[(f"encoder.image_{key}", value) for key in ("mean", "std") for value in ([0.5], [0.5] * 4, [NAN] * 3, 0.5, None)],
    *[("encoder.image_std", value) for value in ([0.0] * 3, [0.5, -0.5, 0.5])],
    *[("encoder", value) for value in (None, [], "clip", 1)],
    *[("encoder.config", value) for value in (None, [], "clip", {"hidden_size": 12})],
    *[("encoder.included", value) for value in (None, "yes", 1, False)],
    *[("encoder.fingerprint", value) for value in (None, 1, "", "0" * 12)],
    *[("sites", value) for value in (None, [], {}, "all", [None], [{}], 3)],
    *[(key, value) for key in ("self_attention", "mlp") for value in ("no", 1, None, False)],
    *[("rank", value) for value in (0, -1, 1.5, "4", 4, 10**7)],
    ("title", 5),
    ("depth", 10**7),
    ("unknown", 1),
    ("encoder.unknown", 1),
    ("sites.0.unknown", 1),
    ("sites.0.name", None),
    ("sites.0.name", 7),
    ("sites.0.name", "input_blocks.2.1.transformer_blocks.0"),
    ("encoder.config.num_hidden_layers", 10**6),
    ("encoder.config.num_attention_heads", 5),
    ("encoder.config.hidden_act", "no such function"),
    ("encoder.config.num_channels", 4),
    ("encoder.config.hidden_act", 1),
    ("encoder.config.layer_norm_eps", NAN),
    ("encoder.config.layer_norm_eps", "text"),
    ("encoder.config.return_dict", False),
    ("encoder.image_std", [1e-320] * 3),
    ("encoder.image_mean", [1e308] * 3),
    ("strength", 1e38),
    ("sites.0.name", "n" * 10**6),
    ("n" * 10**6, 1),
    ("title", "t" * 10**6),
    ("encoder.name", "n" * 10**6),
    ("encoder.fingerprint", "f" * 10**6),
    ("depth", 64),
]


@pytest.mark.parametrize(("key", "value"), CONFIG, ids=lambda value: repr(value)[:30])
def test_config(file: File, key: str, value: Any) -> None:
    put(file.config, key, value)
    refused(lambda: load_adapter(file.write_config()), file.path)


@pytest.mark.parametrize(("count", "names"), [(50_000, "distinct"), (4_000, "distinct"), (1, "distinct")])
def test_number_of_sites(file: File, count: int, names: str) -> None:
    site = file.config["sites"][0]
    file.config["sites"] = [{**site, "name": f"block.{number}"} for number in range(count)]
    refused(lambda: load_adapter(file.write_config()), file.path, "sites")


TEXTS = {
    "nothing": "",
    "no JSON": "{",
    "null": "null",
    "list": "[]",
    "number": "1",
    "nested": "[" * 100_000 + "]" * 100_000,
    "nested within": '{"encoder": ' * 5_000 + "1" + "}" * 5_000,
    "long number": '{"context_width": ' + "9" * 5_000 + "}",
    "surrogate": '{"host": "\\ud800"}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_config_text(file: File, text: str) -> None:
    file.metadata["config"] = text
    refused(lambda: load_adapter(file.write()), file.path, "config")


def test_depth_beyond_what_the_file_holds(file: File) -> None:
    """Thousands of small tensors named like branches: nothing of the depth is built for each."""
    site = file.config["sites"][0]
    file.config.update(sites=[{**site, "name": f"block.{number}"} for number in range(4000)], depth=64)
    file.tensors.update({f"branches.{number}.zero_linear.weight": torch.zeros(1) for number in range(4000)})
    refused(lambda: load_adapter(file.write_config()), file.path, "sites")


@pytest.mark.parametrize("version", ["", "0", "2", "99", "one", "9" * 10**6])
def test_format_version(file: File, version: str) -> None:
    file.metadata["format_version"] = version
    refused(lambda: load_adapter(file.write()), file.path, "version")


@pytest.mark.parametrize("key", ["format", "format_version", "config"])
def test_metadata_that_is_missing(file: File, key: str) -> None:
    del file.metadata[key]
    refused(lambda: load_adapter(file.write()), file.path)


ADAPTER, ENCODER = "projection.weight", "encoder.vision_model.embeddings.class_embedding"
DEEP = "branches.0.zero_linear.weight"
DEEP_ENCODER = "encoder.vision_model.encoder.layers.1.mlp.fc2.bias"


@pytest.mark.parametrize("name", [ADAPTER, DEEP, ENCODER, DEEP_ENCODER])
@pytest.mark.parametrize("change", BROKEN_WEIGHTS.values(), ids=BROKEN_WEIGHTS)
def test_weights(file: File, name: str, change: Callable) -> None:
    weight = change(file.tensors.pop(name))
    if weight is not None:
        file.tensors[name] = weight.contiguous()
    refused(lambda: load_adapter(file.write()), file.path, name.removeprefix("encoder.vision_model."))


@pytest.mark.parametrize(
    "name", ["extra", "branches.9.zero_linear.weight", "encoder.vision_model.extra", "null_tokens"]
)
def test_weights_that_have_no_place(file: File, name: str) -> None:
    file.tensors[name] = torch.zeros(2)
    refused(lambda: load_adapter(file.write()), file.path)


def test_the_encoder_of_another_adapter(file: File) -> None:
    for name in file.tensors:
        if name.startswith("encoder."):
            file.tensors[name] = torch.randn_like(file.tensors[name])
    refused(lambda: load_adapter(file.write()), file.path, "encoder")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated(file: File, share: float, suffix: str) -> None:
    if suffix == ".safetensors":
        data = file.write().read_bytes()
    else:
        torch.save(file.tensors, file.path)
        data = file.path.read_bytes()
    broken = file.path.with_suffix(suffix)
    broken.write_bytes(data[: int(len(data) * share)])
    refused(lambda: load_adapter(broken), broken)


HEADERS = {
    "longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "enormous": b"\xff" * 8 + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"abcd",
    "list": (2).to_bytes(8, "little") + b"[]",
    "empty": (2).to_bytes(8, "little") + b"{}",
    "nothing": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "zip": b"PK\x03\x04" + b"\0" * 30,
    "offsets beyond the end": (76).to_bytes(8, "little")
    + b'{"projection.weight":{"dtype":"F32","shape":[999999],"data_offsets":[0,4]}}'.ljust(76),
    "unknown type": (70).to_bytes(8, "little")
    + b'{"projection.weight":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}'.ljust(70)
    + b"\0" * 4,
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt"])
def test_files_of_another_kind(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(data)
    refused(lambda: load_adapter(path), path)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a file ran')",))


OBJECTS = {
    "code": Bomb(),
    "nothing": {},
    "None": None,
    "list": [torch.zeros(2)],
    "tensor": torch.zeros(2),
    "numbers as keys": {1: torch.zeros(2)},
    "texts": {"projection.weight": "text"},
    "nested": {"state_dict": {"projection.weight": {"a": torch.zeros(2)}}},
    "projection without dimensions": {"preprocess_module.project_layer.weight": torch.tensor(1.0)},
    "projection alone": {"preprocess_module.project_layer.weight": torch.zeros(4, 4)},
    "sizes without numbers": {"projection.weight": torch.zeros(1).expand(10**7, 10**7)},
    "sparse": {"projection.weight": torch.zeros(4, 4).to_sparse()},
    "meta": {"projection.weight": torch.zeros(10**7, 10**7, device="meta")},
    "long names": {"n" * 10**6: torch.zeros(1)},
    "module of long names": {f"{'n' * 10**6}{number}": number for number in range(9)},
    "branch of another name": {"preprocess_module.project_layer.weight": torch.zeros(4, 4), "blocks.x": torch.zeros(1)},
}


@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS)
def test_pickled_objects(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "broken.pt"
    torch.save(value, path)
    refused(lambda: load_adapter(path), path)
    path.write_bytes(pickle.dumps(value))
    refused(lambda: load_adapter(path), path)


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pt", "folder.safetensors", "folder.pt", "n" * 5000, "a\0b"])
def test_paths(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.startswith("folder"):
        path.mkdir()
    refused(lambda: load_adapter(path), name[:80].split("\0")[0])
