"""Sampling with a frozen model: a batch gives the pictures that its rows give alone."""

from __future__ import annotations

import pytest
import torch
from support.small_training import make_config, make_models, make_photos

from feedface_core.guidance import text_then_face
from trainer.models.adapter import load_models
from trainer.training.sampling import sample

GUIDANCE = text_then_face(3.0, 2.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("sampling")
    loaded = load_models(make_config(make_models(root / "models"), make_photos(root / "photos"), root / "run"), "cpu")
    torch.manual_seed(0)
    for branch in loaded.adapter.branches:
        torch.nn.init.normal_(branch.zero_linear.weight, std=0.2)
    return loaded


@torch.no_grad()
def test_rows_of_a_batch_are_the_pictures_drawn_alone(models):
    frozen, adapter = models.frozen, models.adapter
    hidden = models.encoder.encode(torch.rand(2, 64, 64, 3))  # (2, T, E)
    noise = torch.randn(2, *frozen.latent_shape(64, 64))
    text = frozen.encode_text(["a person", "a photo of somebody else"])

    def draw(index: list[int]) -> torch.Tensor:
        face = adapter.control(adapter.project(hidden[index]))
        chosen = {name: value[index] for name, value in text.items()}
        return sample(frozen, noise[index], chosen, GUIDANCE, face, steps=3)

    together, alone = draw([0, 1]), torch.cat([draw([0]), draw([1])])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert (together[0] - together[1]).abs().mean() > 0.1


@torch.no_grad()
def test_without_a_face_no_adapter_is_needed(models):
    frozen = models.frozen
    noise, text = torch.randn(2, *frozen.latent_shape(64, 64)), frozen.encode_text(["a person", ""])
    attached = sample(frozen, noise, text, GUIDANCE, None, steps=2)
    frozen.detach()
    try:
        torch.testing.assert_close(sample(frozen, noise, text, GUIDANCE, None, steps=2), attached)
    finally:
        frozen.attach(models.adapter)
