"""The U-ViT and the released adapter on it, against the numbers of the released implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from feedface_core.conditioning import Face
from feedface_core.errors import FeedFaceError
from feedface_core.files.adapter_file import load_adapter
from feedface_core.hosts import list_sites, match_sites
from feedface_core.hosts.hooks import BranchHooks
from feedface_core.hosts.uvit import default_sites, family
from feedface_core.modules.encoder import build_encoder, encode, encode_pixels
from feedface_core.modules.uvit import UViT, timestep_embedding
from feedface_core.modules.uvit_config import UViTConfig

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden"
TOLERANCE = 1e-4  # relative; wrong variants are at least 1.4 % away


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return torch.load(GOLDEN / "uvit.pth", weights_only=True)


@pytest.fixture
def host(weights) -> UViT:
    config = UViTConfig.from_state_dict(weights, json.loads((GOLDEN / "config.json").read_text()))
    host = UViT(config).eval().requires_grad_(False)
    host.load_state_dict(weights)
    return host


@pytest.fixture(scope="module")
def released():
    return load_adapter(GOLDEN / "feed.pt")


@pytest.fixture
def inputs(golden) -> dict[str, Tensor]:
    decoder = torch.load(GOLDEN / "caption_decoder.pth", weights_only=True)
    prefix = torch.nn.Linear(*reversed(decoder["encode_prefix.weight"].shape))
    prefix.load_state_dict({key: decoder[f"encode_prefix.{key}"] for key in ("weight", "bias")})
    with torch.no_grad():
        text = prefix(golden["in.text_states"])
    return {"latent": golden["in.latent"], "clip_img": golden["in.clip_img"], "text": text, "t_img": golden["in.t_img"]}


@pytest.fixture
def hidden(released, golden) -> Tensor:
    encoder = build_encoder(released.config.encoder, released.encoder_tensors)
    return encode_pixels(encoder, released.config.encoder, golden["in.crops"])


def test_sizes_of_the_golden_model(weights):
    config = UViTConfig.from_state_dict(weights, {"heads": 2})
    assert config == UViTConfig(width=48, heads=2, depth=4, hidden=192, grid=(8, 8))


def test_sizes_of_the_released_model():
    """The defaults are UniDiffuser v1's: 952 M parameters, and the heads follow from the width."""
    with torch.device("meta"):
        host = UViT(UViTConfig())
    assert sum(p.numel() for p in host.parameters()) == pytest.approx(952e6, rel=0.001)
    assert UViTConfig.from_state_dict(host.state_dict()) == UViTConfig()
    sites = [site.name for site in default_sites(host)]
    assert sites == [f"{side}.{i}" for side in ("in_blocks", "out_blocks") for i in range(0, 13, 2)]
    assert {(site.heads, site.head_dim) for site in default_sites(host)} == {(64, 24)}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "out.plain_img"),
        ({"data_type": torch.zeros(2)}, "out.plain_img_data_type0"),
        ({"t_text": torch.full((2,), 1000.0)}, "out.plain_img_text_time_1000"),
    ],
)
def test_plain_prediction(host, inputs, golden, given, name):
    picture, token = host(**inputs, **given)
    assert relative(picture, golden[name]) < TOLERANCE
    if not given:
        assert relative(token, golden["out.plain_clip"]) < TOLERANCE


def control_of(adapter, face, **fields):
    return adapter.control_of(face, "cpu", torch.float32, **fields)


def test_face_tokens(released, hidden, golden):
    assert relative(released.build().project(hidden), golden["out.face_tokens"]) < TOLERANCE


def test_crops_are_normalised_as_released(released, golden):
    """Encoding from floats 0…1 is encoding the released pixels −1…1."""
    encoder = build_encoder(released.config.encoder, released.encoder_tensors)
    crops = (golden["in.crops"].movedim(1, -1) + 1) / 2
    inside = crops.clamp(0, 1)
    wanted = encode_pixels(encoder, released.config.encoder, inside.movedim(-1, 1) * 2 - 1)
    assert relative(encode(encoder, released.config.encoder, inside), wanted) < 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("combination", ["concat", "mean", "first"])
def test_prediction_with_faces(host, released, inputs, hidden, golden, combination, strength):
    adapter = released.build()
    references = hidden[:1] if combination == "first" else hidden
    face = Face(references, combination="average" if combination == "mean" else "concat")
    hooks = BranchHooks(host, adapter)
    with hooks.faces([(2, control_of(adapter, face, strength=strength))]):
        picture, token = host(**inputs)
    assert relative(picture, golden[f"out.{combination}_{strength}_img"]) < TOLERANCE
    assert relative(token, golden[f"out.{combination}_{strength}_clip"]) < TOLERANCE
    hooks.remove()
    assert relative(host(**inputs)[0], golden["out.plain_img"]) < TOLERANCE


def test_prediction_with_a_crop_of_zeros(host, released, inputs, golden):
    adapter = released.build()
    encoder = build_encoder(released.config.encoder, released.encoder_tensors)
    hidden = encode_pixels(encoder, released.config.encoder, torch.zeros(1, 3, 224, 224))
    with BranchHooks(host, adapter).faces([(2, control_of(adapter, Face(hidden)))]):
        picture, _ = host(**inputs)
    assert relative(picture, golden["out.zero_crop_1.0_img"]) < TOLERANCE


def test_face_of_one_row_leaves_the_other(host, released, inputs, hidden, golden):
    adapter = released.build()
    with BranchHooks(host, adapter).faces([(1, None), (1, control_of(adapter, Face(hidden)))]):
        picture, _ = host(**inputs)
    assert relative(picture[:1], golden["out.plain_img"][:1]) < TOLERANCE
    assert relative(picture[1:], golden["out.concat_1.0_img"][1:]) < TOLERANCE


def test_branches_change_picture_tokens_only(host, released, inputs, hidden):
    """At the first site the text, time and CLIP tokens leave the block as the frozen model made them."""
    adapter = released.build()
    seen = []
    host.in_blocks[1].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    host(**inputs)
    with BranchHooks(host, adapter).faces([(2, control_of(adapter, Face(hidden)))]):
        host(**inputs)
    plain, faced = seen
    assert torch.equal(plain[:, :-64], faced[:, :-64])
    assert (plain[:, -64:] - faced[:, -64:]).abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("size", [(16, 16), (32, 16), (24, 40), (13, 9), (2, 2)], ids=str)
def test_any_size(host, inputs, size):
    latent = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    picture, token = host(**{**inputs, "latent": latent})
    assert picture.shape == latent.shape and token.shape == (2, 1, 512)
    assert torch.isfinite(picture).all()


def test_position_embeddings_of_other_sizes(host):
    """A table that is linear over the picture stays linear; the other tokens' entries are not touched."""
    with torch.no_grad():
        rows = torch.arange(8.0).view(8, 1).expand(8, 8).flatten()
        host.pos_embed[0, 80:] = rows[:, None]
    positions = host.positions((16, 8), torch.zeros(1))
    assert positions.shape == (1, 81 + 128, 48)
    assert torch.equal(positions[:, 3:81], host.pos_embed[:, 2:80])
    assert torch.equal(positions[:, 2:3], host.pos_embed_token)
    steps = positions[0, 81:, 0].view(16, 8)[:, 0].diff()
    torch.testing.assert_close(steps[1:-1], torch.full((13,), 0.5))


def test_timestep_embedding():
    embedded = timestep_embedding(torch.tensor([0.0, 1.0]), 4)
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.540302, 0.99995, 0.841471, 0.0099998]])
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=0)


def test_sites(host, released):
    sites = list_sites(host)
    assert [site.name for site in sites] == ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    assert family(host) == "unidiffuser" and {site.width for site in sites} == {48}
    assert [site.name for site in match_sites(released.config, host)] == ["in_blocks.0", "out_blocks.0"]


def test_text_of_another_length(host, inputs):
    with pytest.raises(ValueError, match=r"text must be \(B, 77, 64\), got \(2, 76, 64\)"):
        host(**{**inputs, "text": inputs["text"][:, 1:]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("pos_embed_token"), "this is UniDiffuser v0"),
        (lambda w: w.pop("text_embed.weight"), "not UniDiffuser's"),
        (lambda w: w.pop("in_blocks.0.norm3.weight"), "pre-norm"),
        (
            lambda w: [w.pop(key) for key in list(w) if key.startswith("out_blocks.1")],
            "with 3 blocks around the middle one: expected an even number",
        ),
        (lambda w: w.clear() or w.update({"encode_prefix.weight": torch.zeros(1)}), "caption decoder"),
    ],
    ids=["v0", "no text", "pre-norm", "cut off", "caption decoder"],
)
def test_other_models_are_told_apart(weights, change, message):
    changed = dict(weights)
    change(changed)
    with pytest.raises(FeedFaceError, match=message):
        UViTConfig.from_state_dict(changed, {"heads": 2})


def test_sizes_that_do_not_fit(weights):
    with pytest.raises(ValueError, match="number of attention heads cannot be read off"):
        UViTConfig.from_state_dict(weights)
    with pytest.raises(ValueError, match="cannot be split into 5"):
        UViTConfig.from_state_dict(weights, {"heads": 5})
    changed = {**weights, "pos_embed": torch.zeros(1, 143, 48)}
    with pytest.raises(ValueError, match="leaves 63 for the picture .* not a grid of 7 x 7"):
        UViTConfig.from_state_dict(changed, {"heads": 2})
    assert UViTConfig.from_state_dict(changed, {"heads": 2, "grid": [9, 7]}).grid == (9, 7)
