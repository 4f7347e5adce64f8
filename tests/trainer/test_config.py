"""Settings: files, overrides, and errors that name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import Config, load_config
from trainer.preparation.settings import PrepareSettings
from trainer.settings import ConfigError, describe, load, read_yaml, setting_names

CONFIGS = Path(__file__).resolve().parents[2] / "trainer/configs"


@pytest.mark.parametrize("name", ["sd15", "sdxl", "tiny", "unidiffuser", "paper"])
def test_shipped_configs_load_survive_json_and_show_their_launch_command(name):
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path)
    assert Config.from_json(config.to_json()) == config
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"trainer.train trainer/configs/{name}.yaml" in line for line in header)
    assert config.train.batch_size % config.optimiser.accumulation == 0


def test_overrides_are_yaml_and_win_over_the_file():
    config = load_config(
        CONFIGS / "sd15.yaml",
        [
            "train.steps=100",
            "optimiser.lr=2e-5",
            "adapter.sites=[middle_block.1, a.b]",
            "data.cache=null",
            "adapter.encoder.image_mean=[0.5, 0.5, 0.5]",
            "loss.min_snr_gamma=5",
            'adapter.title="a: b"',
        ],
    )
    assert config.train.steps == 100
    assert config.optimiser.lr == 2e-5
    assert config.adapter.sites == ["middle_block.1", "a.b"]
    assert config.data.cache is None
    assert config.adapter.encoder.image_mean == (0.5, 0.5, 0.5)
    assert config.loss.min_snr_gamma == 5.0
    assert config.train.batch_size == 96  # from the file


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", "did you mean train.steps?"),
        ("steps=3", "did you mean train.steps?"),
        ("data.flips=true", "did you mean data.flip?"),
        ("loss.face_drop=0.1", "did you mean loss.face_dropout?"),
        ("xyzzy.q=1", "known here: model, adapter, data, loss, optimiser, train, validation"),
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.steps=0", "train.steps: Input should be greater than 0, found 0"),
        ("loss.face_dropout=1.5", "loss.face_dropout: Input should be less than or equal to 1"),
        ("data.resolution=500", "data.resolution: Input should be a multiple of 8"),
        ("data.references=6", "data.references: Input should be less than or equal to 5"),
        ("loss.kind=masked", "'standard', 'mask' or 'regularised', found 'masked'"),
        ("optimiser.accumulation=7", "train.batch_size (96) has to divide by optimiser.accumulation (7)"),
        ("train.steps", "expected name=value"),
        ("train.steps.x=1", "steps is a setting, not a section"),
        ("train.steps=[1", "not valid YAML"),
    ],
)
def test_wrong_overrides_name_the_setting(override, expected):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIGS / "sd15.yaml", [override])
    assert expected in str(error.value)


def test_files_that_cannot_be_used(tmp_path):
    missing = tmp_path / "no.yaml"
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(missing)
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(broken)
    broken.write_text("- train\n")
    with pytest.raises(ConfigError, match="expected sections with settings, found a list"):
        load_config(broken)
    broken.write_text("trian:\n  steps: 3\n")
    with pytest.raises(ConfigError, match=r"broken.yaml: there is no setting trian; did you mean train\?"):
        load_config(broken)
    broken.write_text("loss:\n")
    with pytest.raises(ConfigError, match="model: Field required"):
        load_config(broken)


def test_section_with_everything_commented_out_means_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text((CONFIGS / "tiny.yaml").read_text() + "\n")
    text = path.read_text().replace("loss:\n  kind: regularised\n  normalise: area\n", "loss:\n")
    assert "kind: regularised" not in text
    path.write_text(text)
    assert load_config(path).loss.kind == "regularised"


def test_settings_are_immutable():
    config = load_config(CONFIGS / "tiny.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


def test_help_lists_every_setting_with_a_meaning():
    text = describe(Config)
    names = list(setting_names(Config))
    assert "adapter.encoder.image_mean" in names and len(names) > 50
    assert all(f"  {name}: " in text for name in names)
    assert "  train.output: required" in text
    assert "  optimiser.warmup_steps: 100\n      Optimiser steps of linear warm-up" in text


def test_prepare_settings_use_the_same_machinery():
    settings = load(PrepareSettings, None, ["filter.minimum_face=96"], {"photos": "a", "output": "b: c"})
    assert (settings.filter.minimum_face, settings.output) == (96, "b: c")
    with pytest.raises(ConfigError, match=r"did you mean filter.minimum_face\?"):
        load(PrepareSettings, None, ["filter.min_face=96"], {"photos": "a", "output": "b"})


def test_words_that_yaml_would_turn_into_something_else(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("off: no\nnull: null\nyes: [on, true, 3]\n")
    assert read_yaml(path.read_text()) == {"off": "no", "null": None, "yes": ["on", True, 3]}
