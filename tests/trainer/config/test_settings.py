"""Settings: files, overrides, former names, and errors that name the setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from trainer.config import Config, PrepareSettings
from trainer.config.settings import list_settings
from trainer.errors import TrainerError

CONFIGS = Path(__file__).resolve().parents[3] / "trainer/configs"


@pytest.mark.parametrize("name", ["sd15", "sdxl", "tiny", "unidiffuser", "paper"])
def test_shipped_configs_load_survive_json_and_show_their_launch_command(name):
    path = CONFIGS / f"{name}.yaml"
    config = Config.load(path)
    assert Config.from_json(config.to_json()) == config
    assert yaml.safe_load(path.read_text())["adapter"].keys() <= config.adapter.model_dump().keys()  # no former names
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"trainer.train trainer/configs/{name}.yaml" in line for line in header)
    assert config.train.batch_size % config.optimiser.accumulation == 0


def test_overrides_are_yaml_and_win_over_the_file():
    config = Config.load(
        CONFIGS / "sd15.yaml",
        [
            "train.steps=100",
            "optimiser.lr=2e-5",
            "adapter.sites=[middle_block.1, a.b]",
            "data.cache=null",
            "data.manifest=a, b.jsonl",
            "adapter.encoder.image_mean=[0.5, 0.5, 0.5]",
            "loss.min_snr_gamma=5",
            'adapter.title="a: b"',
        ],
    )
    assert config.train.steps == 100
    assert config.optimiser.lr == 2e-5
    assert config.adapter.sites == ["middle_block.1", "a.b"]
    assert config.data.cache is None and config.data.manifest == "a, b.jsonl"
    assert config.adapter.encoder.image_mean == (0.5, 0.5, 0.5)
    assert config.loss.min_snr_gamma == 5.0
    assert config.adapter.title == "a: b"
    assert config.train.batch_size == 96  # from the file
    assert Config.load(CONFIGS / "sd15.yaml", ["adapter.sites=all"]).adapter.sites == "all"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", "there is no setting train.stepz; did you mean train.steps?"),
        ("steps=3", "did you mean train.steps?"),
        ("data.flips=true", "did you mean data.flip?"),
        ("data.seed=1", "did you mean train.seed?"),
        ("loss.face_drop=0.1", "did you mean loss.face_dropout?"),
        ("trian={steps: 3}", "there is no setting trian; did you mean train?"),
        ("xyzzy.q=1", "known here: model, adapter, data, loss, optimiser, train, validation"),
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.steps=0", "train.steps: Input should be greater than 0, found 0"),
        ("optimiser.lr=.inf", "optimiser.lr: Input should be a finite number, found inf"),
        ("loss.face_dropout=1.5", "loss.face_dropout: Input should be less than or equal to 1"),
        ("data.resolution=500", "data.resolution: Input should be a multiple of 8"),
        ("data.references=6", "data.references: Input should be less than or equal to 5"),
        ("loss.kind=masked", "'standard', 'mask' or 'regularised', found 'masked'"),
        ("adapter.dropped_face=off!", "adapter.dropped_face: Input should be 'none', 'learned' or 'zero_crop'"),
        ("optimiser.accumulation=7", "train.batch_size (96) has to divide by optimiser.accumulation (7)"),
        ("train.steps", "expected name=value"),
        ("train.steps.x=1", "train.steps: Input should be a valid integer, found {'x': 1}"),
        ("train=3", "train: Input should be a valid dictionary"),
        ("train.steps=[1", "not valid YAML"),
        ("train={steps: 1, steps: 2}", "steps is there twice"),
    ],
)
def test_wrong_overrides_name_the_setting(override, expected):
    with pytest.raises(TrainerError) as error:
        Config.load(CONFIGS / "sd15.yaml", [override])
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [1", "broken.yaml: not valid YAML"),
        ("- train\n", "broken.yaml: expected sections with settings, found a list"),
        ("trian:\n  steps: 3\n", "there is no setting trian; did you mean train?"),
        ("loss:\n", "model: Field required"),
        ("train:\n  steps: 3\n  output: a\n  steps: 4\n", "steps is there twice"),
        ("train:\n  steps: 3\ndata:\n  repeat: 2\ntrain:\n  seed: 4\n", "train is there twice"),
    ],
)
def test_files_that_cannot_be_used(text, expected, tmp_path):
    path = tmp_path / "broken.yaml"
    with pytest.raises(TrainerError, match="broken.yaml: cannot read the configuration"):
        Config.load(path)
    path.write_text(text)
    with pytest.raises(TrainerError) as error:
        Config.load(path)
    assert expected in str(error.value) and "broken.yaml" in str(error.value)


def test_section_with_everything_commented_out_means_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    text = (CONFIGS / "tiny.yaml").read_text().replace("loss:\n  kind: regularised\n  normalise: area\n", "loss:\n")
    assert "kind: regularised" not in text
    path.write_text(text)
    assert Config.load(path).loss.kind == "regularised"


def test_environment_is_not_read(monkeypatch):
    for name, value in {"TRAIN": '{"steps": 9}', "train__steps": "9", "LOSS": "{}", "output": "x"}.items():
        monkeypatch.setenv(name, value)
    assert Config.load(CONFIGS / "tiny.yaml").train.steps == 30
    with pytest.raises(TrainerError, match="output: Field required"):
        PrepareSettings.load(photos="a")


@pytest.mark.parametrize(("former", "name"), [("off", "none"), ("learned", "learned"), ("zero_crop", "zero_crop")])
def test_former_name_of_the_dropped_face_is_read(former, name, tmp_path):
    config = Config.load(CONFIGS / "tiny.yaml", [f"adapter.dropped_face={name}"])
    values = json.loads(config.to_json())
    assert values["adapter"].pop("dropped_face") == name
    values["adapter"]["null"] = former  # as checkpoints had it
    assert Config.from_json(json.dumps(values)) == config and config.adapter.null == former
    path = tmp_path / "old.yaml"
    path.write_text((CONFIGS / "tiny.yaml").read_text().replace("adapter:\n", f"adapter:\n  null: {former}\n"))
    assert Config.load(path) == config
    assert Config.load(path, ["adapter.dropped_face=learned"]).adapter.dropped_face == "learned"
    assert Config.load(CONFIGS / "paper.yaml", [f"adapter.null={former}"]).adapter.dropped_face == name


def test_settings_are_immutable():
    config = Config.load(CONFIGS / "tiny.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


def test_help_lists_every_setting_with_a_meaning():
    text = Config.describe()
    names = [name for name, _ in list_settings(Config)]
    assert "adapter.encoder.image_mean" in names and len(names) > 50
    assert all(f"  {name}: " in text for name in names)
    assert "  train.output: required" in text
    assert "  optimiser.warmup_steps: 100\n      Optimiser steps of linear warm-up" in text


def test_prepare_settings_use_the_same_machinery():
    settings = PrepareSettings.load(None, ["filter.minimum_face=96"], photos="a", output="b: c")
    assert (settings.filter.minimum_face, settings.output) == (96, "b: c")
    with pytest.raises(TrainerError, match=r"did you mean filter.minimum_face\?"):
        PrepareSettings.load(None, ["filter.min_face=96"], photos="a", output="b")


def test_facenet_looks_at_photos_which_shards_do_not_have():
    identity = "loss.identity={weight: 1.0, recogniser: facenet, path: a.pt}"
    assert Config.load(CONFIGS / "sd15.yaml", [identity]).loss.identity.sees_crops
    with pytest.raises(TrainerError, match="data.shards has none"):
        Config.load(CONFIGS / "sd15.yaml", [identity, "data.shards=shards", "data.cache=null"])
