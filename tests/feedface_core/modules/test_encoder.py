"""Face tokens from the CLIP vision model of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from feedface_core.config import EncoderConfig
from feedface_core.modules.encoder import build_encoder, encode, fingerprint, preprocess

FIELDS = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 32,
}
CONFIG = EncoderConfig(config=FIELDS, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


@pytest.fixture(scope="module")
def reference() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**FIELDS, image_size=224)).eval()


def prefixed(model) -> dict:
    """The names that files on the hub have, whatever this version of transformers calls its own."""
    return {"vision_model." + name.removeprefix("vision_model."): t for name, t in model.state_dict().items()}


def test_hidden_states_are_the_penultimate_layer(reference):
    encoder = build_encoder(CONFIG, prefixed(reference))
    crops = torch.rand(2, 224, 224, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(crops.movedim(-1, 1) * 2 - 1, output_hidden_states=True).hidden_states[-2]
    found = encode(encoder, CONFIG, crops)
    assert found.shape == (2, 50, 48) == (2, CONFIG.tokens, CONFIG.width)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_names_with_and_without_the_prefix_load(reference):
    plain = {name.removeprefix("vision_model."): tensor for name, tensor in prefixed(reference).items()}
    crops = torch.rand(1, 64, 64, 3)
    assert torch.equal(
        encode(build_encoder(CONFIG, plain), CONFIG, crops),
        encode(build_encoder(CONFIG, prefixed(reference)), CONFIG, crops),
    )


def test_normalisation_comes_from_the_config():
    grey = torch.full((1, 224, 224, 3), 0.5)
    assert not preprocess(grey, CONFIG).any()
    clip = preprocess(grey, EncoderConfig(config=FIELDS))
    assert clip[0, :, 0, 0].tolist() == pytest.approx([0.0690, 0.1613, 0.3328], abs=1e-3)


def test_crops_of_another_size_are_resized():
    assert preprocess(torch.rand(2, 100, 80, 3), CONFIG).shape == (2, 3, 224, 224)


@pytest.mark.parametrize(
    "crops, message",
    [
        (torch.zeros(0, 224, 224, 3), "N at least 1"),
        (torch.zeros(1, 3, 224, 224), r"must be \(N, H, W, 3\)"),
        (torch.full((1, 8, 8, 3), float("nan")), "NaN"),
    ],
)
def test_bad_crops_are_refused(crops, message):
    with pytest.raises(ValueError, match=message):
        preprocess(crops, CONFIG)


def test_weights_that_do_not_fit_are_named(reference):
    weights = prefixed(reference)
    del weights["vision_model.pre_layrnorm.bias"]
    with pytest.raises(ValueError, match="1 missing: .*pre_layrnorm.bias"):
        build_encoder(CONFIG, weights)


def test_fingerprint_tells_encoders_apart_and_copies_together(reference):
    weights = prefixed(reference)
    half = {name: tensor.half() for name, tensor in weights.items()}
    assert fingerprint(CONFIG, weights) == fingerprint(CONFIG, half)
    assert len(fingerprint(CONFIG, weights)) == 12
    torch.manual_seed(1)
    other = CLIPVisionModel(CLIPVisionConfig(**FIELDS, image_size=224))
    assert fingerprint(CONFIG, weights) != fingerprint(CONFIG, prefixed(other))
    assert fingerprint(CONFIG, weights) != fingerprint(EncoderConfig(config=FIELDS), weights)
