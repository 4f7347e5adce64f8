"""Conversion of the released files to safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from feedface_core.files import convert, released
from feedface_core.files.adapter_file import load_adapter
from feedface_core.modules.uvit_config import UViTConfig
from feedface_core.state_dict import read_state_dict

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden"


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("uvit.pth", "feed.pt", "caption_decoder.pth", "config.json"):
        shutil.copy(GOLDEN / name, tmp_path)
    return tmp_path


def test_all_three_in_half_precision(folder, capsys):
    files = ["uvit.pth", "caption_decoder.pth", "feed.pt"]
    target = folder / "converted"
    assert convert.main([*(str(folder / name) for name in files), "--dtype", "fp16", "--output", str(target)]) == 0
    captured = capsys.readouterr()
    for name in files:
        written = target / f"{Path(name).stem}-fp16.safetensors"
        assert written.stat().st_size < 0.52 * (folder / name).stat().st_size
        assert f"{name}: 100%" in captured.err
        tensors = load_file(written)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    source = torch.load(folder / "uvit.pth", weights_only=True)
    converted = load_file(target / "uvit-fp16.safetensors")
    assert all(torch.equal(converted[key], tensor.half()) for key, tensor in source.items())
    assert captured.out.count("checked") == 3
    assert not [path for path in target.iterdir() if path.suffix == ".tmp"]


def test_converted_uvit_needs_no_config_beside_it(folder):
    assert convert.main([str(folder / "uvit.pth"), "--caption-decoder", str(folder / "caption_decoder.pth")]) == 0
    tensors, metadata = read_state_dict(folder / "uvit.safetensors")
    assert tensors["encode_prefix.weight"].shape == (64, 768)
    settings = released.settings_for(Path("elsewhere/uvit.safetensors"), {}, metadata)
    assert settings == {"heads": 2, "text_tokens": 77, "grid": (8, 8)}
    assert UViTConfig.from_state_dict(tensors, settings).heads == 2


def test_converted_adapter_is_the_adapter(folder):
    assert convert.main([str(folder / "feed.pt")]) == 0
    ours, theirs = load_adapter(folder / "feed.safetensors"), load_adapter(folder / "feed.pt")
    assert ours.config == theirs.config
    assert all(torch.equal(ours.tensors[key], tensor) for key, tensor in theirs.tensors.items())
    assert all(torch.equal(ours.encoder_tensors[key], tensor) for key, tensor in theirs.encoder_tensors.items())
    assert ours.metadata["modelspec.architecture"] == "unidiffuser/feedface"


def test_caption_decoder_leaves_its_language_model_out(folder):
    state = torch.load(folder / "caption_decoder.pth", weights_only=True)
    torch.save({**state, "gpt.wte.weight": torch.zeros(1000, 64)}, folder / "caption_decoder.pth")
    conversion = convert.plan(folder / "caption_decoder.pth")
    assert conversion.left_out == ("gpt.wte.weight",) and conversion.tensors.keys() == state.keys()


def test_progress_counts_writing_and_checking(folder):
    planned, counts = convert.plan(folder / "uvit.pth"), []
    conversion = convert.cast(planned, torch.float16, counts.append)
    assert sum(counts) == conversion.size() == planned.size(torch.float16) == planned.size() / 2
    convert.write(conversion, folder / "out.safetensors", counts.append)
    assert sum(counts) == 3 * conversion.size() and min(counts) > 0
    assert (folder / "out.safetensors").stat().st_mode & 0o077 == (folder / "uvit.pth").stat().st_mode & 0o077


def test_faulty_writing_is_noticed(folder, monkeypatch):
    conversion = convert.plan(folder / "uvit.pth")

    def faulty(path, tensors, metadata):
        save_file({**tensors, "norm.bias": tensors["norm.bias"] + 1}, str(path), metadata=metadata)
        return path

    monkeypatch.setattr(convert, "write_safetensors", faulty)
    with pytest.raises(ValueError, match=r"norm\.bias reads back differently"):
        convert.write(conversion, folder / "out.safetensors")
    assert not [path for path in folder.iterdir() if "out" in path.name]


def test_values_beyond_half_precision(folder):
    state = torch.load(folder / "uvit.pth", weights_only=True)
    state["norm.weight"][0] = 1e5
    torch.save(state, folder / "uvit.pth")
    with pytest.raises(ValueError, match=r"norm\.weight reaches 1e\+05, which torch\.float16 cannot hold; use bf16"):
        convert.cast(convert.plan(folder / "uvit.pth"), torch.float16)
    held = convert.cast(convert.plan(folder / "uvit.pth"), torch.bfloat16)
    assert held.tensors["norm.weight"].dtype == torch.bfloat16


def test_errors_come_before_any_work(folder, capsys):
    def error(*arguments) -> str:
        assert convert.main([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err

    (folder / "feed.safetensors").touch()
    assert "feed.safetensors exists; give --overwrite" in error(folder / "uvit.pth", folder / "feed.pt")
    assert not (folder / "uvit.safetensors").exists()
    assert "no file" in error(folder / "absent.pth")
    assert "golden.safetensors: none of the released files" in error(GOLDEN / "golden.safetensors", "--output", folder)
    assert "--caption-decoder goes with the U-ViT" in error(
        folder / "feed.pt", "--caption-decoder", folder / "caption_decoder.pth", "--overwrite"
    )
    assert "written to the same place" in error(folder / "feed.pt", folder / "feed.pt", "--overwrite")


def test_no_room_on_the_disk(folder, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="needs 0.00 GB, but .* has 0.00 GB free"):
        convert.write(convert.plan(folder / "uvit.pth"), folder / "out.safetensors")


def test_metadata_of_a_file_says_what_it_is(folder):
    convert.main([str(folder / "uvit.pth")])
    with safe_open(str(folder / "uvit.safetensors"), framework="pt") as file:
        assert file.metadata()["format"] == "unidiffuser-uvit"
        assert file.metadata()["modelspec.architecture"] == "unidiffuser-v1"
