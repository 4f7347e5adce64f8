"""Adapter files written from checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support.small_training import make_config, make_models, make_photos, train_in_process_of_its_own, weights

from feedface_core.files.adapter_file import load_adapter
from tools.tiny_diffusers import make_encoder
from trainer import export
from trainer.config import stated_licence
from trainer.errors import TrainerError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    manifest = make_photos(root / "photos")
    rows = [json.loads(line) | {"crop_scale": 1.25, "crop_border": "clamp"} for line in open(manifest)]
    manifest.write_text("\n".join(json.dumps(row) for row in rows))
    config = make_config(make_models(root / "models"), manifest, root / "run", adapter__title="Somebody")
    result = train_in_process_of_its_own(config)
    assert result.returncode == 0, result.stderr
    return root


def test_moving_average_in_half_precision_is_the_default(trained):
    path = export.export(trained / "run")
    assert path == trained / "run" / "run-6.safetensors"
    found = load_adapter(path)
    average = weights(trained / "run", 6, "ema")
    assert found.tensors["projection.weight"].dtype == torch.float16
    assert all(torch.equal(found.tensors[name], value.half()) for name, value in average.items())
    assert found.config.title == "Somebody" and found.config.host == "sd_unet"
    assert found.encoder_tensors and found.config.encoder.included
    encoder = found.config.encoder  # says how the face crops of the manifest were made
    assert (encoder.crop_scale, encoder.crop_border, encoder.crop_fill) == (1.25, "clamp", 0.5)
    told = found.metadata
    assert told["training.step"] == "6" and told["training.samples"] == "24" and told["training.weights"] == "ema"
    assert told["modelspec.resolution"] == "64x64" and told["modelspec.title"] == "Somebody"
    assert json.loads(told["training.config"])["optimiser"]["lr"] == 1e-3
    assert json.loads(told["training.base"])["name"] == "base"


def test_raw_weights_of_an_older_checkpoint(trained, tmp_path):
    target = tmp_path / "raw.safetensors"
    export.export(trained / "run" / "checkpoint-00000004", target, "raw", "fp32", "Other")
    found = load_adapter(target)
    raw = weights(trained / "run", 4)
    assert found.tensors.keys() == raw.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in raw.items())
    assert found.config.title == "Other" and found.metadata["training.weights"] == "raw"


def test_licences_are_stated(trained, tmp_path):
    first = load_adapter(export.export(trained / "run", tmp_path / "a.safetensors")).metadata
    assert not {"modelspec.license", "license.base", "license.encoder"} & first.keys()
    base = trained / "models" / "base"
    try:
        (base / "README.md").write_text("---\ntags: [x]\nlicense: creativeml-openrail-m\n---\n# license: other\n")
        told = load_adapter(export.export(trained / "run", tmp_path / "b.safetensors", licence="CC-BY-4.0")).metadata
    finally:
        (base / "README.md").unlink()
    assert told["modelspec.license"] == "CC-BY-4.0" and told["license.base"] == "creativeml-openrail-m"
    assert "license.encoder" not in told


def test_stated_licence(tmp_path):
    assert stated_licence(str(tmp_path / "nothing")) == stated_licence("runwayml/model") == ""
    (tmp_path / "README.md").write_text("# Model\nlicense: none of the fields\n")
    assert stated_licence(str(tmp_path)) == ""
    (tmp_path / "README.md").write_text('---\nlicense: "mit"\n---\n')
    assert stated_licence(str(tmp_path)) == "mit" and stated_licence(str(tmp_path / "model.ckpt")) == "mit"
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", {"modelspec.license": "OpenRAIL"})
    assert stated_licence(str(tmp_path / "m.safetensors")) == "OpenRAIL"


def test_null_hidden_goes_along(trained, tmp_path):
    config = make_config(
        trained / "models",
        trained / "photos" / "manifest.jsonl",
        tmp_path / "zero",
        train__steps=1,
        adapter__null="zero_crop",
    )
    assert train_in_process_of_its_own(config).returncode == 0
    found = load_adapter(export.export(tmp_path / "zero", precision="bf16"))
    assert found.tensors["null_hidden"].shape == (1, 5, 32)
    assert found.tensors["null_hidden"].abs().max() > 0
    assert found.dtype == torch.bfloat16
    assert found.config.encoder.fingerprint == load_adapter(export.export(trained / "run")).config.encoder.fingerprint


def test_errors(trained, tmp_path, capsys):
    assert export.main([str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    other = make_encoder(tmp_path / "other", image_size=64, seed=5)
    with pytest.raises(TrainerError, match="is not the encoder of this run"):
        export.export(trained / "run", encoder_path=str(other))
    checkpoint = export.find_checkpoint(trained / "run")
    checkpoint.tensors.pop("ema")
    with pytest.raises(TrainerError, match="has no moving average"):
        checkpoint.weights("ema")
    assert export.main([str(trained / "run"), "-o", str(tmp_path / "a.safetensors"), "--precision", "fp32"]) == 0
    assert "wrote" in capsys.readouterr().out
