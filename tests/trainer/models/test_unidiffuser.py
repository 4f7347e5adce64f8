"""UniDiffuser as a base: the released numbers through the trainer's interface, its joint latents, and a short run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from support.small_training import make_photos, moved, weights
from torch import Tensor

from feedface_core.conditioning import Face
from feedface_core.files.adapter_file import load_adapter
from feedface_core.modules.encoder import build_encoder, encode_pixels
from tools.tiny_diffusers import TinySize, make_base, make_encoder
from trainer import export, train
from trainer.cache import make_cache
from trainer.config import Config, ModelSettings, load_config
from trainer.errors import TrainerError
from trainer.models.frozen_model import FrozenModel, load_frozen_model
from trainer.models.unidiffuser import pack, rows_below, unpack
from trainer.models.unidiffuser_files import is_unidiffuser

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "data" / "golden"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The golden files in their released layout, with a small Stable Diffusion and CLIP beside them."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("unidiffuser")
    for name in ("uvit.pth", "caption_decoder.pth", "feed.pt", "config.json"):
        shutil.copy(GOLDEN / name, folder)
    make_base(folder / "sd", "sd1", TinySize(context=768, text_layers=1))
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 32,
    }
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=512)).save_pretrained(folder / "clip")
    return folder


def settings(files: Path, **changes) -> ModelSettings:
    return ModelSettings(
        **{
            "base": str(files / "uvit.pth"),
            "precision": "fp32",
            "image_encoder": str(files / "clip"),
            "stable_diffusion": str(files / "sd"),
            **changes,
        }
    )


@pytest.fixture
def base(files):
    return load_frozen_model(settings(files))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def golden_inputs(base, golden) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The golden input as latents, timesteps counted from 0, and text."""
    latents = pack(golden["in.latent"], golden["in.clip_img"])
    with torch.no_grad():
        text = {"states": base.modules["text"](golden["in.text_states"])}
    return latents, golden["in.t_img"].long() - 1, text


def test_interface(base):
    assert isinstance(base, FrozenModel) and base.family == "unidiffuser" and base.context_width == 48
    assert not any(parameter.requires_grad for parameter in base.host.parameters()) and not base.host.training
    assert base.latent_shape(512, 512) == (4, 66, 64)  # 512 numbers of the token in two rows of 4 x 64
    assert base.latent_shape(64, 128) == (4, 16, 16)
    assert base.scheduler.config.num_train_timesteps == 1000 and base.prediction == "epsilon"
    assert [float(base.scheduler.alphas_cumprod[t]) for t in (0, 999)] == pytest.approx([0.99915, 0.00466], rel=1e-3)
    states = base.encode_text(["a photo", ""])["states"]
    assert states.shape == (2, 77, 64) and torch.equal(states[1:], base.null_text()["states"])


def test_prediction_is_the_released_one(base, golden):
    latents, timesteps, text = golden_inputs(base, golden)
    picture, token = unpack(base.predict(latents, timesteps, text), 512)
    assert relative(picture, golden["out.plain_img"]) < TOLERANCE
    assert relative(token, golden["out.plain_clip"]) < TOLERANCE


def test_prediction_with_faces_is_the_released_one(base, golden, files):
    released = load_adapter(files / "feed.pt")
    adapter = released.build()
    hidden = encode_pixels(
        build_encoder(released.config.encoder, released.encoder_tensors), released.config.encoder, golden["in.crops"]
    )
    base.attach(adapter)
    latents, timesteps, text = golden_inputs(base, golden)
    rows = [(2, adapter.control_of(Face(hidden), "cpu", torch.float32, strength=0.8))]
    picture, token = unpack(base.predict(latents, timesteps, text, rows), 512)
    assert relative(picture, golden["out.concat_0.8_img"]) < TOLERANCE
    assert relative(token, golden["out.concat_0.8_clip"]) < TOLERANCE
    base.detach()
    assert relative(base.predict(latents, timesteps, text)[:, :, :16], golden["out.plain_img"]) < TOLERANCE


@pytest.mark.parametrize("width", [64, 16, 12, 8])
def test_packing(width):
    picture, token = torch.randn(2, 4, 10, width), torch.randn(2, 1, 512)
    state = pack(picture, token)
    assert state.shape == (2, 4, 10 + math.ceil(128 / width), width)
    assert rows_below(width, 512) == math.ceil(128 / width)
    assert all(torch.equal(a, b) for a, b in zip(unpack(state, 512), (picture, token), strict=True))


def test_latents_hold_the_picture_and_its_token(base):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = base.encode_pixels(pixels)
    assert moments.shape == (2, 8, 24, 8)
    picture, token = unpack(base.sample_latents(moments), 512)
    assert torch.equal(token, base.image_token(pixels))  # not scaled, and without noise
    assert torch.equal(unpack(base.sample_latents(moments, torch.randn(2, 4, 24, 8)), 512)[1], token)
    theirs = base.stable_diffusion.sample_latents(base.stable_diffusion.encode_pixels(pixels))
    torch.testing.assert_close(picture, theirs)
    assert base.decode(base.sample_latents(moments)).shape == pixels.shape


def test_image_token_is_clips_embedding(base, files):
    """As transformers computes it from the picture in CLIP's own normalisation."""
    from transformers import CLIPModel

    from feedface_core.config import CLIP_MEAN, CLIP_STD

    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    model = CLIPModel.from_pretrained(files / "clip")
    with torch.no_grad():
        found = model.get_image_features(pixel_values=(pixels - mean) / std)
    found = getattr(found, "pooler_output", found)
    assert relative(base.image_token(pixels * 2 - 1), found.unsqueeze(1)) < 1e-5


def test_encoders_compute_in_full_precision(files, base):
    half = load_frozen_model(settings(files, precision="bf16"))
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments, states = base.encode_pixels(pixels), base.encode_text(["a photo"])["states"]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(half.encode_pixels(pixels), moments)
            assert torch.equal(half.encode_text(["a photo"])["states"], states)
    assert {parameter.dtype for parameter in half.host.parameters()} == {torch.bfloat16}


def test_weights_of_the_loss(base):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :4] = 1.0
    picture, token = unpack(base.loss_weights(mask, torch.zeros(1, 4, 24, 16)), 512)
    assert torch.equal(picture, mask.expand(-1, 4, -1, -1)) and token.unique().tolist() == [0.25]


def test_cells_that_hold_nothing_have_no_loss(base):
    """At 96 pixels the token leaves cells over: their prediction is their noise, whatever the noise."""
    shape = (2, *base.latent_shape(96, 96))
    assert shape == (2, 4, 23, 12)
    noise, timesteps = torch.randn(shape), torch.tensor([5, 900])
    latents = pack(torch.randn(2, 4, 12, 12), torch.randn(2, 1, 512))
    noisy = base.scheduler.add_noise(latents, noise, timesteps)
    prediction = base.predict(noisy, timesteps, base.encode_text(["", "a"]))
    over = pack(torch.ones(2, 4, 12, 12), torch.ones(2, 1, 512)) == 0
    assert int(over.sum()) == 2 * 16
    torch.testing.assert_close(prediction[over], noise[over], atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(files, golden):
    gradients = []
    for recompute in (False, True):
        base = load_frozen_model(settings(files))
        released = load_adapter(files / "feed.pt")
        adapter = released.build().requires_grad_(True)
        base.attach(adapter)
        calls = []
        if recompute:
            base.enable_gradient_checkpointing()
            base.host.in_blocks[0].register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        hidden = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(1))
        control = adapter.control(adapter.project(hidden))
        prediction = base.predict(*golden_inputs(base, golden), [(2, control)])
        prediction.square().mean().backward()
        assert len(calls) == (2 if recompute else 0)  # forward, and again on the way back
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert sum(float(gradient.abs().sum()) for gradient in gradients[0]) > 0


def test_sites(base):
    assert [site.name for site in base.sites("default")] == ["in_blocks.0", "out_blocks.0"]
    assert {(site.heads, site.head_dim) for site in base.sites("all")} == {(2, 24)} and len(base.sites("all")) == 5
    assert base.sites(["mid_block"], heads=4)[0].head_dim == 12
    with pytest.raises(TrainerError, match=r"adapter\.sites: .* has no site 'in_blocks\.9'; it has in_blocks\.0"):
        base.sites(["in_blocks.9"])
    with pytest.raises(TrainerError, match=r"adapter\.heads: 5 does not divide the width 48"):
        base.sites("all", heads=5)


def test_fingerprints_and_release(files, base):
    other = load_frozen_model(settings(files), components=("autoencoder", "text"))
    assert base.fingerprint(["autoencoder"]) == other.fingerprint(["autoencoder"]) != base.fingerprint(["text"])
    base.release("text", "autoencoder")
    assert base.null_text()["states"].shape == (1, 77, 64)
    with pytest.raises(TrainerError, match="autoencoder component was not loaded, or has been released"):
        base.encode_pixels(torch.zeros(1, 3, 64, 64))
    with pytest.raises(TrainerError, match="host component was not loaded"):
        _ = other.host


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_encoder": None}, r"model\.image_encoder: .*CLIP ViT-B/32"),
        ({"stable_diffusion": None}, r"model\.stable_diffusion: .*autoencoder and text encoder"),
        ({"stable_diffusion": "absent"}, r"model\.stable_diffusion: "),
        ({"caption_decoder": "absent.pth"}, r"model\.caption_decoder: absent\.pth: no such file"),
        ({"image_encoder": "{files}/plain_clip"}, r"is no CLIPVisionModelWithProjection: 1 weights are missing"),
        ({"base": "{files}/caption_decoder.pth"}, r"model\.base: .*this is UniDiffuser's caption decoder"),
        (
            {"base": "{files}/sd", "family": "unidiffuser"},
            r"model\.base: .*is not a file; for UniDiffuser give uvit_v1",
        ),
    ],
)
def test_errors(files, changes, message):
    make_encoder(files / "plain_clip", image_size=64)
    given = {name: value and value.format(files=files) for name, value in changes.items()}
    with pytest.raises(TrainerError, match=message):
        load_frozen_model(settings(files, **given))


def test_told_apart(files):
    assert is_unidiffuser(files / "uvit.pth") and not is_unidiffuser(files / "sd")
    assert not is_unidiffuser(files / "clip" / "model.safetensors")


def test_published_settings():
    """The YAML file is a valid configuration, with the numbers of the publication."""
    config = load_config(ROOT / "trainer/configs/unidiffuser.yaml")
    assert (config.train.batch_size, config.train.steps, config.optimiser.lr) == (96, 50000, 2e-5)
    assert config.optimiser.betas == (0.9, 0.9) and config.optimiser.weight_decay == 0.03
    assert config.adapter.encoder.image_mean == (0.5, 0.5, 0.5) and config.adapter.tap == "output"
    assert (config.loss.kind, config.loss.normalise, config.loss.face_dropout) == ("regularised", "average", 0.1)
    assert config.adapter.null == "off"


def test_short_run(files, tmp_path, monkeypatch):
    """Cache, train and export: the adapter has the released form and loads as the released one does."""
    encoder = make_encoder(files / "face_encoder", image_size=64)
    config = Config.load(
        model=settings(files).model_dump(),
        adapter={"encoder": {"path": str(encoder), "image_size": 64}, "tap": "output"},
        data={
            "manifest": str(make_photos(tmp_path / "photos")),
            "resolution": 64,
            "workers": 0,
            "references": 2,
            "cache": str(tmp_path / "cache"),
        },
        optimiser={"lr": 1e-3, "warmup_steps": 1},
        train={
            "output": str(tmp_path / "run"),
            "steps": 4,
            "batch_size": 4,
            "checkpoint_every": 2,
            "log_every": 2,
            "validate_every": 4,
            "tracker": "none",
        },
        validation={"prompts": ["a person"], "steps": 2},
    )
    make_cache(config, progress=False)
    try:
        assert train.train(config) is True
    finally:
        torch.use_deterministic_algorithms(False)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert moved(weights(tmp_path / "run", 2), weights(tmp_path / "run", 4))
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in logged if "loss" in line)
    assert export.main([str(tmp_path / "run"), "-o", str(tmp_path / "trained.safetensors")]) in (0, None)
    found = load_adapter(tmp_path / "trained.safetensors")
    assert (found.config.host, found.config.tap) == ("unidiffuser", "output")
    assert [site.name for site in found.config.sites] == ["in_blocks.0", "out_blocks.0"]
    assert found.tensors.keys() == load_adapter(GOLDEN / "feed.pt").tensors.keys()
