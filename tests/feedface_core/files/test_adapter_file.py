"""Adapter files: written, read back, described, and refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from feedface_core.conditioning import Face
from feedface_core.config import AdapterConfig, EncoderConfig, SiteConfig
from feedface_core.errors import FeedFaceError
from feedface_core.faces import CROP_SCALE, FILL
from feedface_core.files.adapter_file import load_adapter, main, save_adapter
from feedface_core.files.atomic import write_safetensors
from feedface_core.files.face_file import LONGEST_NOTE, load_face, read_face, save_face
from feedface_core.modules.adapter import FaceAdapter
from feedface_core.modules.encoder import build_encoder

ENCODER = EncoderConfig(
    config={
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 112,
    }
)
CONFIG = AdapterConfig(
    "sd1", (SiteConfig("input_blocks.1.1.transformer_blocks.0", 24, 3, 8),), 16, ENCODER, title="Test adapter"
)


@pytest.fixture
def written(tmp_path):
    torch.manual_seed(0)
    adapter = FaceAdapter(CONFIG)
    torch.nn.init.normal_(adapter.branches[0].zero_linear.weight)
    path = save_adapter(tmp_path / "a.safetensors", CONFIG, adapter.state_dict(), build_encoder(ENCODER).state_dict())
    return path, adapter


def test_what_was_written_is_read(written):
    path, adapter = written
    found = load_adapter(path)
    assert replace(found.config.encoder, fingerprint="") == ENCODER
    assert replace(found.config, encoder=ENCODER) == CONFIG
    rebuilt = found.build()
    assert all(torch.equal(tensor, rebuilt.state_dict()[name]) for name, tensor in adapter.state_dict().items())
    assert found.encoder_tensors and len(found.config.encoder.fingerprint) == 12
    assert not [leftover for leftover in path.parent.iterdir() if leftover != path]
    (path.parent / "plain").touch()
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode  # safetensors writes for the owner alone


def test_file_that_does_not_know_of_face_crops_means_the_old_ones(written):
    path, _ = written
    older = json.loads(CONFIG.to_json())
    for name in ("crop_scale", "crop_border", "crop_fill"):
        del older["encoder"][name]
    found = AdapterConfig.from_json(json.dumps(older))
    assert found == CONFIG
    assert (found.encoder.crop_scale, found.encoder.crop_border, found.encoder.crop_fill) == (CROP_SCALE, "pad", FILL)
    other = replace(CONFIG, encoder=replace(ENCODER, crop_scale=1.4, crop_border="clamp", crop_fill=0.25))
    assert AdapterConfig.from_json(other.to_json()) == other
    assert "1.1 × the box, pad at the border" in load_adapter(path).summary()


@pytest.mark.parametrize(
    "changes", [{"crop_scale": 0.0}, {"crop_scale": float("nan")}, {"crop_border": "cut"}, {"crop_fill": 1.5}]
)
def test_face_crops_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(ENCODER, **changes)


def test_equal_contents_give_equal_files(tmp_path):
    """Of safetensors alone the metadata come in another order each time."""
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.float16)}
    metadata = {name: f'{name} "quoted"\n\t→ é' for name in "zyxwvutsrq"}
    files = [write_safetensors(tmp_path / f"{i}.safetensors", tensors, metadata).read_bytes() for i in range(4)]
    assert len(set(files)) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert write_safetensors(tmp_path / "bare.safetensors", tensors, {}).stat().st_size < len(files[0])


def test_half_precision_halves_the_file(written, tmp_path):
    path, adapter = written
    half = save_adapter(tmp_path / "half.safetensors", CONFIG, adapter.state_dict(), dtype=torch.float16)
    weights = sum(parameter.numel() for parameter in adapter.parameters())
    header = int.from_bytes(half.read_bytes()[:8], "little") + 8
    assert half.stat().st_size - header == 2 * weights
    found = load_adapter(half)
    assert found.dtype == torch.float16 and not found.config.encoder.included
    assert found.build(dtype=torch.bfloat16).projection.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_with_its_encoder_in_another_type_is_read(written, tmp_path, dtype):
    found = load_adapter(written[0])
    path = save_adapter(tmp_path / "b.safetensors", found.config, found.tensors, found.encoder_tensors, dtype=dtype)
    again = load_adapter(path)
    # Half precision in both cases: a face encoded with one of them fits the others.
    assert again.dtype == dtype and again.encoder_tensors["post_layernorm.weight"].dtype == torch.float16
    assert again.config == found.config


def test_metadata_follow_modelspec(written):
    metadata = load_adapter(written[0]).metadata
    assert metadata["format"] == "feedface-adapter"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/feedface"
    assert metadata["modelspec.title"] == "Test adapter"
    assert len(metadata["modelspec.hash_sha256"]) == 66
    assert json.loads(metadata["config"])["sites"][0]["name"] == "input_blocks.1.1.transformer_blocks.0"


def test_the_hash_depends_on_the_weights_alone(written, tmp_path):
    path, adapter = written
    again = save_adapter(tmp_path / "b.safetensors", CONFIG, adapter.state_dict(), load_adapter(path).encoder_tensors)
    hashes = [load_adapter(file).metadata["modelspec.hash_sha256"] for file in (path, again)]
    assert hashes[0] == hashes[1]
    state = adapter.state_dict()
    state["projection.weight"] = state["projection.weight"] + 1
    changed = save_adapter(tmp_path / "c.safetensors", CONFIG, state)
    assert load_adapter(changed).metadata["modelspec.hash_sha256"] != hashes[0]


class Bomb:
    """Runs code when unpickled; safe loading must never get that far."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a pickle ran')",))


def bad_files(path, written):
    """Name → (contents written to ``path``, what the message must say)."""
    good = written.read_bytes()
    tensors = load_file(written)
    metadata = load_adapter(written).metadata

    def edited(**changes):
        save_file(tensors, str(path), metadata={**metadata, **changes})

    def without(name):
        save_file({key: value for key, value in tensors.items() if key != name}, str(path), metadata=metadata)

    def config(**changes):
        edited(config=json.dumps({**json.loads(metadata["config"]), **changes}))

    return {
        "truncated": (lambda: path.write_bytes(good[: len(good) // 2]), "truncated or of another kind"),
        "empty": (lambda: path.write_bytes(b""), "truncated or of another kind"),
        "text": (lambda: path.write_text("not an adapter"), "truncated or of another kind"),
        "lora": (lambda: save_file({"lora_unet_a.weight": torch.zeros(1)}, str(path)), "a LoRA"),
        "checkpoint": (lambda: save_file({"model.diffusion_model.x": torch.zeros(1)}, str(path)), "models/checkpoints"),
        "newer": (lambda: edited(format_version="9"), "version '9'.*Update FeedFace"),
        "no config": (lambda: edited(config="{}"), "config not understood"),
        "unknown host": (lambda: config(host="flux"), "host: expected 'sd1'.*, found 'flux'"),
        "unknown tap": (lambda: config(tap="middle"), "tap: expected 'input' or 'output', found 'middle'"),
        "no sites": (lambda: config(sites=[]), "sites or text_tokens, this one has neither"),
        "missing weight": (lambda: without("projection.weight"), "1 missing: projection.weight"),
        "other width": (lambda: config(context_width=20), "of another shape: .* is .*, expected"),
        "encoder gone": (
            lambda: save_file(
                {key: value for key, value in tensors.items() if not key.startswith("encoder.")},
                str(path),
                metadata=metadata,
            ),
            "says the face encoder is included",
        ),
    }


CASES = (
    "truncated",
    "empty",
    "text",
    "lora",
    "checkpoint",
    "newer",
    "no config",
    "unknown host",
    "unknown tap",
    "no sites",
    "missing weight",
    "other width",
    "encoder gone",
)


@pytest.mark.parametrize("case", CASES)
def test_bad_files_are_refused_by_name(case, written, tmp_path):
    path = tmp_path / "bad.safetensors"
    cases = bad_files(path, written[0])
    assert set(cases) == set(CASES)
    write, message = cases[case]
    write()
    with pytest.raises(FeedFaceError, match=f"(?s)bad.safetensors.*{message}"):
        load_adapter(path)


def test_code_in_a_pickle_never_runs(tmp_path):
    path = tmp_path / "bomb.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FeedFaceError, match="holds code, which is never run"):
        load_adapter(path)
    torch.save({"blocks.0.zero_linear.weight": Bomb()}, path)
    with pytest.raises(FeedFaceError, match="holds code, which is never run"):
        load_adapter(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        load_adapter(tmp_path / "nowhere.safetensors")


def test_a_failed_write_leaves_nothing(written, tmp_path):
    _, adapter = written
    state = adapter.state_dict()
    state.pop("projection.weight")
    with pytest.raises(ValueError, match="1 missing: projection.weight"):
        save_adapter(tmp_path / "new.safetensors", CONFIG, state)
    assert not (tmp_path / "new.safetensors").exists()
    with pytest.raises(ValueError, match="written as .safetensors"):
        save_adapter(tmp_path / "new.pt", CONFIG, adapter.state_dict())


def test_the_command_prints_what_the_file_holds(written, capsys, tmp_path):
    assert main([str(written[0])]) == 0
    out = capsys.readouterr().out
    assert "sd1: Stable Diffusion 1.x" in out and "1 of widths 24" in out and "included" in out
    assert out.strip() == load_adapter(written[0]).summary().strip()
    assert main([str(written[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["context_width"] == 16
    assert main([str(tmp_path / "nowhere.safetensors")]) == 1
    assert "nowhere.safetensors: no such file" in capsys.readouterr().err


def test_faces_are_kept_with_weights_and_combination(tmp_path):
    face = Face(torch.randn(2, 5, 12), (1.0, 0.25), "average", "0123456789ab")
    found = load_face(save_face(tmp_path / "library" / "ann.safetensors", face))
    assert torch.equal(found.hidden, face.hidden)
    assert (found.weights, found.combination, found.encoder) == (face.weights, face.combination, face.encoder)


def test_note_on_consent_is_kept_with_a_face(tmp_path):
    face = Face(torch.randn(1, 5, 12), (1.0,), "concat", "0123456789ab")
    for note, kept in (("Ann, 2026-11-30: portraits", "Ann, 2026-11-30: portraits"), (" ", ""), ("", "")):
        found, consent = read_face(save_face(tmp_path / "ann.safetensors", face, note))
        assert consent == kept and torch.equal(found.hidden, face.hidden)
    with pytest.raises(FeedFaceError, match=f"consent: {LONGEST_NOTE + 1} characters"):
        save_face(tmp_path / "long.safetensors", face, "x" * (LONGEST_NOTE + 1))
    assert not (tmp_path / "long.safetensors").exists()


def test_summary_states_every_licence(written):
    file = load_adapter(written[0])
    stated = {"modelspec.license": "CC-BY-4.0", "license.base": "CreativeML Open RAIL-M", "license.encoder": "MIT"}
    lines = dataclasses.replace(file, metadata=file.metadata | stated).summary().splitlines()
    assert lines[-3:] == ["licence        CC-BY-4.0", "of the base    CreativeML Open RAIL-M", "of the encoder MIT"]
    assert file.summary().count("not stated") == 3


def test_what_is_no_face_is_refused(written, tmp_path):
    with pytest.raises(FeedFaceError, match="not a saved face.*'feedface-adapter'"):
        load_face(written[0])
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(FeedFaceError, match="truncated"):
        load_face(tmp_path / "x.safetensors")
