"""Adapters of several kinds, and what each must do: learn, and go on where it stopped."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from trainer import train
from trainer.config import Config
from trainer.data.batch import Batch, collate
from trainer.data.dataset import FaceDataset, TensorShapes
from trainer.data.manifest import read_manifest
from trainer.models.adapter import Models

from .small_training import largest_difference, make_config, weights

TEXT = {
    "adapter__text_tokens": {"count": 2, "layers": 2, "width": 16},
    "adapter__encoder": {"image_size": 64, "pooling": "class", "layer": -1},
}
LORA = {"train__unet": "lora", "adapter__lora": {"rank": 3, "alpha": 6.0}}
FULL = {"train__unet": "full", "loss__kind": "mask"}
STREAMS = {
    "text": TEXT,
    "branches with a background": {"adapter__background": True},
    "text with a background": {**TEXT, "adapter__background": True},
}
"""What goes into the model beside its own inputs."""
UNETS = {"LoRA": {**TEXT, **LORA}, "all": {**TEXT, **FULL}, "LoRA and branches": LORA}
"""What of the U-Net is trained along."""
KINDS = {**STREAMS, **UNETS}


def first_of(cases: Iterable[str]) -> list[ParameterSet]:
    """The first case for every run of the tests, the others for the slow ones."""
    first, *others = cases
    return [pytest.param(first), *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


def config_of(files: tuple[Path, Path], output: Path, kind: str | None = None, **changes) -> Config:
    """Settings of a run of six steps of a kind of adapter; without one, of branches to the face.

    Args:
        files: folder of the models, and the manifest.
        output: folder of the run.
        kind: one of :data:`KINDS`.
        changes: further settings, ``section__name=value``.
    """
    values = {**KINDS.get(kind, {}), **changes}
    if "adapter__encoder" in values:
        values["adapter__encoder"] = {"path": str(files[0] / "clip"), **values["adapter__encoder"]}
    return make_config(*files, output, **values)


def batch_of(config: Config, models: Models, size: int = 6) -> tuple[FaceDataset, Batch]:
    """The data set of a configuration, and its first samples."""
    records, _ = read_manifest(config.data.manifest)
    dataset = FaceDataset(records, config, TensorShapes.of(models.frozen, config.data.resolution))
    return dataset, collate([dataset[index, 0] for index in range(size)])


def train_whole_and_in_parts(files: tuple[Path, Path], folder: Path, kind: str) -> dict[str, Tensor]:
    """Trains at once and with a stop after four steps, which is to be the same to the last bit, and every weight is to
    have learned; the weights are returned."""
    whole, parts = (config_of(files, folder / name, kind) for name in ("whole", "parts"))
    assert train.train(whole)
    assert train.train(config_of(files, folder / "parts", kind, train__steps=4, optimiser__schedule="constant"))
    assert train.train(parts)
    for name in ("trainables", "optimiser", "ema"):
        assert largest_difference(weights(folder / "whole", 6, name), weights(folder / "parts", 6, name)) == 0.0, name
    first, last = (weights(folder / "whole", step) for step in (2, 6))
    assert [name for name in first if torch.equal(first[name], last[name])] == [], "all of it is trained"
    return last
