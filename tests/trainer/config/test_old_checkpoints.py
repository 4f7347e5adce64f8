"""Checkpoints hold the configuration as JSON; those written when settings had other names are gone on from."""

from __future__ import annotations

import json

import pytest
from support.small_training import make_config, make_models, make_photos

from feedface_core.files.adapter_file import load_adapter
from trainer import export, train
from trainer.training.checkpoint import load_latest, save_checkpoint


@pytest.mark.parametrize(("former", "name"), [("off", "none"), ("learned", "learned")])
def test_checkpoint_with_former_settings(former, name, tmp_path, caplog, alone):
    models, manifest = make_models(tmp_path / "models"), make_photos(tmp_path / "photos")
    output, changes = tmp_path / "run", {"adapter__dropped_face": name}
    assert train.train(make_config(models, manifest, output, train__steps=2, **changes))
    checkpoint = load_latest(output)
    config = json.loads(checkpoint.state["config"])
    assert config["adapter"].pop("dropped_face") == name
    config["adapter"]["null"] = former
    config["model"]["compile"] = True  # a setting that no longer exists
    save_checkpoint(output, checkpoint.tensors, checkpoint.state | {"config": json.dumps(config)}, keep=3)
    assert load_adapter(export.export(output)).config.null == former
    assert "left out the former setting model.compile" in caplog.text
    caplog.clear()
    assert train.train(make_config(models, manifest, output, train__steps=4, **changes))
    assert "going on from" in caplog.text and "other settings" not in caplog.text
    assert load_latest(output).step == 4
