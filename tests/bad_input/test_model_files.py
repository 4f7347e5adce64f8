"""Files of UniDiffuser, of its released adapter and of the small model that are broken in one place each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.refused import BROKEN_WEIGHTS, refused
from torch import Tensor

from feedface_core.files.adapter_file import load_adapter
from feedface_core.files.released import read_prefix, read_uvit

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
SMALL = Path(__file__).resolve().parents[2] / "models" / "feedface_small"
NAN, INF = float("nan"), float("inf")

BROKEN: dict[str, Callable[[Tensor], Tensor | None]] = {
    **BROKEN_WEIGHTS,
    "fp8 NaN": lambda weight: torch.full_like(weight, NAN).to(torch.float8_e4m3fn),
}
READERS = {"uvit": read_uvit, "caption_decoder": read_prefix, "feed": load_adapter}
WEIGHTS = {
    "uvit": [
        "pos_embed", "patch_embed.proj.weight", "in_blocks.0.attn.qkv.weight", "in_blocks.0.norm3.weight",
        "mid_block.mlp.fc1.weight", "out_blocks.1.skip_linear.weight", "text_embed.weight", "clip_img_embed.weight",
        "token_embedding.weight", "pos_embed_token", "decoder_pred.bias",
    ],
    "caption_decoder": ["encode_prefix.weight", "encode_prefix.bias"],
    "feed": [
        "preprocess_module.project_layer.weight", "blocks.0.zero_linear.weight",
        "preprocess_module.clip_model.embeddings.class_embedding",
        "preprocess_module.clip_model.embeddings.patch_embedding.weight",
        "preprocess_module.clip_model.embeddings.position_embedding.weight",
        "preprocess_module.clip_model.encoder.layers.0.mlp.fc1.weight",
        "preprocess_module.clip_model.encoder.layers.2.mlp.fc2.bias",
    ],
}  # fmt: skip


def copy(name: str, folder: Path) -> Path:
    """One of the released files with its settings, for changes."""
    (path,) = (shutil.copy(file, folder) for file in GOLDEN.glob(f"{name}.p*t*"))
    shutil.copy(GOLDEN / "config.json", folder / f"{name}.json")
    return Path(path)


@pytest.mark.parametrize("name", READERS)
def test_good_files(tmp_path: Path, name: str) -> None:
    READERS[name](copy(name, tmp_path))


def test_eight_bit_weights_are_read(tmp_path: Path) -> None:
    state = {key: weight.to(torch.float8_e4m3fn) for key, weight in torch.load(GOLDEN / "uvit.pth").items()}
    torch.save(state, tmp_path / "uvit.pth")
    shutil.copy(GOLDEN / "config.json", tmp_path)
    assert read_uvit(tmp_path / "uvit.pth")[0]["pos_embed"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in WEIGHTS.items() for key in keys])
def test_weights(tmp_path: Path, name: str, key: str, change: Callable) -> None:
    path = copy(name, tmp_path)
    state = torch.load(path, weights_only=True)
    weight = change(state.pop(key))
    torch.save(state if weight is None else {**state, key: weight}, path)
    refused(lambda: READERS[name](path), path)


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("key", WEIGHTS["caption_decoder"])
def test_prefix_inside_the_uvit(tmp_path: Path, key: str, change: Callable) -> None:
    path = copy("uvit", tmp_path)
    decoder = torch.load(GOLDEN / "caption_decoder.pth", weights_only=True)
    prefix = {name: decoder[name] for name in WEIGHTS["caption_decoder"]}
    weight = change(prefix.pop(key))
    prefix = prefix if weight is None else {**prefix, key: weight}
    torch.save({**torch.load(path, weights_only=True), **prefix}, path)
    refused(lambda: read_uvit(path), path, "encode_prefix")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", READERS)
def test_truncated(tmp_path: Path, name: str, suffix: str, share: float) -> None:
    path = copy(name, tmp_path)
    if suffix == ".safetensors":
        save_file(torch.load(path, weights_only=True), path.with_suffix(suffix))
    data = path.with_suffix(path.suffix if suffix == ".pth" else suffix).read_bytes()
    broken = tmp_path / f"broken{suffix}"
    broken.write_bytes(data[: int(len(data) * share)])
    refused(lambda: READERS[name](broken), broken)


OBJECTS = {
    "nothing": {},
    "tensor": torch.zeros(2),
    "number": 3,
    "numbers as keys": {1: torch.zeros(2)},
    "text": {"pos_embed": "text"},
    "position table alone": {"pos_embed": torch.zeros(1, 337, 48)},
    "position table without dimensions": {"pos_embed": torch.tensor(1.0)},
    "prefix alone": {"encode_prefix.weight": torch.zeros(64, 768)},
    "prefix without dimensions": {"encode_prefix.weight": torch.tensor(1.0)},
    "projection alone": {"preprocess_module.project_layer.weight": torch.zeros(48, 64)},
    "projection of another name": {"preprocess_module.project_layer.weight_g": torch.zeros(48, 64)},
    "LoRA": {"lora_unet_x.lora_up.weight": torch.zeros(2)},
    "checkpoint": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)},
}


@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS)
@pytest.mark.parametrize("name", READERS)
def test_files_of_another_kind(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / f"{name}.pt"
    torch.save(value, path)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    refused(lambda: READERS[name](path), path)


@pytest.mark.parametrize(("name", "other"), [(a, b) for a in READERS for b in READERS if a != b])
def test_released_files_mixed_up(tmp_path: Path, name: str, other: str) -> None:
    path = copy(other, tmp_path)
    refused(lambda: READERS[name](path), path, "this is")


@pytest.mark.parametrize("blocks", [1, 257, 20_000])
def test_number_of_blocks(tmp_path: Path, blocks: int) -> None:
    path = copy("uvit", tmp_path)
    extra = {f"in_blocks.{number}.x": torch.zeros(1) for number in range(10, 10 + blocks)}
    torch.save({**torch.load(path, weights_only=True), **extra}, path)
    refused(lambda: read_uvit(path), path, "blocks")


@pytest.mark.parametrize("blocks", [1, 5000])
def test_number_of_branches(tmp_path: Path, blocks: int) -> None:
    path = copy("feed", tmp_path)
    path.with_suffix(".json").write_text('{"branch_heads": 2, "vision": {"num_attention_heads": 4}}')
    extra = {f"blocks.{number}.x": torch.zeros(1) for number in range(10, 10 + blocks)}
    torch.save({**torch.load(path, weights_only=True), **extra}, path)
    refused(lambda: load_adapter(path), path)


TEXTS = {
    "nothing": b"",
    "no JSON": b"{",
    "null": b"null",
    "list": b"[]",
    "number": b"1",
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "nested within": b'{"vision": ' * 5_000 + b"1" + b"}" * 5_000,
    "long number": b'{"heads": ' + b"9" * 5_000 + b"}",
    "huge": b'{"heads": 2' + b" " * (2 << 20) + b"}",
    "UTF-16": '{"heads": 2}'.encode("utf-16"),
    "Latin-1": '{"name": "Jürgen", "heads": 2}'.encode("latin-1"),
    "zeros": b"\0" * 100,
}
WHOLE = ["2", None, [], {}, 2.5, True, -1, 0, 7, 10**19]
SETTINGS = [
    *[("uvit", "heads", value) for value in WHOLE],
    *[("uvit", "text_tokens", value) for value in [*WHOLE[:1], *WHOLE[2:]]],
    *[("uvit", "grid", value) for value in ("8x8", [], [8], [8, 8, 1], [8, 9], [0, 64], [-8, -8], [64.0, 1.0], 64, {})],
    *[("feed", "branch_heads", value) for value in [*WHOLE[:1], *WHOLE[2:]]],
    *[("feed", "sites", value) for value in ("all", {}, 2, [1, 2], ["in_blocks.0"], ["a", "a"], ["", "b"])],
    ("feed", "sites", ["x" * 10**5, "b"]),
    *[("feed", "vision", value) for value in ("clip", [], 3, {}, None)],
    *[("feed", "vision", {"num_attention_heads": value}) for value in WHOLE],
]  # fmt: skip


@pytest.mark.parametrize("data", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["uvit", "feed"])
def test_settings_beside_the_file(tmp_path: Path, name: str, data: bytes) -> None:
    path = copy(name, tmp_path)
    path.with_suffix(".json").write_bytes(data)
    refused(lambda: READERS[name](path), path.with_suffix(".json"))


@pytest.mark.parametrize("data", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["uvit", "feed"])
def test_a_broken_config_beside_the_file_is_not_its_own(tmp_path: Path, name: str, data: bytes) -> None:
    """It belongs to some other model in that folder; what misses is the number of heads."""
    path = copy(name, tmp_path)
    path.with_suffix(".json").unlink()
    (tmp_path / "config.json").write_bytes(data)
    refused(lambda: READERS[name](path), path, "heads")


@pytest.mark.parametrize("place", ["own", "shared"])
@pytest.mark.parametrize(("name", "key", "value"), SETTINGS, ids=lambda value: repr(value)[:30])
def test_settings(tmp_path: Path, name: str, key: str, value: Any, place: str) -> None:
    path = copy(name, tmp_path)
    settings = json.loads(path.with_suffix(".json").read_text())
    settings = {**settings, key: value}
    path.with_suffix(".json").write_text(json.dumps(settings))
    if place == "shared":
        path.with_suffix(".json").rename(tmp_path / "config.json")
    refused(lambda: READERS[name](path), path)


@pytest.mark.parametrize("text", [data.decode() for data in TEXTS.values() if data.isascii() and b"\0" not in data])
def test_settings_in_the_metadata(tmp_path: Path, text: str) -> None:
    path = tmp_path / "uvit.safetensors"
    if "heads" in text and len(text) > 10**6:
        text = text.replace('"heads": 2', '"heads": "2"')  # long, and no number either
    save_file(torch.load(GOLDEN / "uvit.pth", weights_only=True), path, {"unidiffuser": text})
    refused(lambda: read_uvit(path), path, "metadata")


class TestSmallModel:
    """The files of the small system, as its node reads them."""

    @pytest.fixture
    def node(self, comfy):
        return comfy.module("nodes.small_model")

    @pytest.fixture
    def error(self, comfy) -> type[Exception]:
        return comfy.module("feedface_core.errors").FeedFaceError

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("unet", "text_encoder", "vae", "tokenizer"):
            shutil.copytree(SMALL / name, tmp_path / name)
        return tmp_path

    LOADERS = {"unet": "load_model", "text_encoder": "load_clip", "vae": "load_vae"}
    KEYS = {
        "unet": "conv_in.weight",
        "text_encoder": "embeddings.token_embedding.weight",
        "vae": "decoder.mid_block.attentions.0.to_q.weight",
    }
    CONFIGS = [
        *[("unet", key, value) for key in ("in_channels", "layers_per_block", "attention_head_dim") for value in WHOLE],
        *[("unet", "block_out_channels", value) for value in (None, [], {}, 128, [10**9] * 2, [128] * 50_000)],
        *[("text_encoder", key, value) for key in ("hidden_size", "num_hidden_layers") for value in WHOLE],
        *[("text_encoder", "hidden_act", value) for value in (None, "none", 3, [])],
        *[("vae", key, value) for key in ("latent_channels", "layers_per_block", "norm_num_groups") for value in WHOLE],
    ]  # fmt: skip

    @pytest.mark.parametrize("name", LOADERS)
    def test_good(self, node, folder: Path, name: str) -> None:
        getattr(node, self.LOADERS[name])(folder)

    @pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
    @pytest.mark.parametrize("name", LOADERS)
    def test_weights(self, node, error, folder: Path, name: str, change: Callable) -> None:
        (path,) = (folder / name).glob("*.safetensors")
        state = load_file(path)
        (key,) = (key for key in state if key.removeprefix("text_model.") == self.KEYS[name])
        weight = change(state.pop(key))
        save_file(state if weight is None else {**state, key: weight}, path)
        refused(lambda: getattr(node, self.LOADERS[name])(folder), folder / name, error=error)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    @pytest.mark.parametrize("name", LOADERS)
    def test_truncated(self, node, error, folder: Path, name: str, share: float) -> None:
        (path,) = (folder / name).glob("*.safetensors")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        refused(lambda: getattr(node, self.LOADERS[name])(folder), path, error=error)

    @pytest.mark.parametrize("data", TEXTS.values(), ids=TEXTS)
    @pytest.mark.parametrize("name", LOADERS)
    def test_config_text(self, node, error, folder: Path, name: str, data: bytes) -> None:
        (folder / name / "config.json").write_bytes(data)
        refused(lambda: getattr(node, self.LOADERS[name])(folder), folder / name / "config.json", error=error)

    @pytest.mark.parametrize(("name", "key", "value"), CONFIGS, ids=lambda value: repr(value)[:30])
    def test_config(self, node, error, folder: Path, name: str, key: str, value: Any) -> None:
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, key: value}))
        refused(lambda: getattr(node, self.LOADERS[name])(folder), path, key, error=error)

    @pytest.mark.parametrize("name", LOADERS)
    @pytest.mark.parametrize("gone", ["config.json", "*.safetensors"])
    def test_missing_files(self, node, error, folder: Path, name: str, gone: str) -> None:
        (path,) = (folder / name).glob(gone)
        path.unlink()
        refused(lambda: getattr(node, self.LOADERS[name])(folder), folder / name, error=error)

    @pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
    @pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[1]", b"[" * 10_000, None])
    def test_tokenizer(self, node, error, folder: Path, name: str, data: bytes | None) -> None:
        path = folder / "tokenizer" / name
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        if name == "merges.txt" and data in (b"", b"{}", b"[1]"):
            return  # a tokenizer of single letters, which the vocabulary holds as well
        refused(lambda: node.load_clip(folder), folder, error=error)
