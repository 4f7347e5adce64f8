"""Frozen bases: the three families, folders and single files, schedules, and errors that help."""

from __future__ import annotations

import json

import pytest
import torch
from support.ldm_layout import folder_to_single_file

from tools.tiny_diffusers import TinySize, make_base
from trainer.config import ModelSettings
from trainer.errors import TrainerError
from trainer.models.frozen_model import FrozenModel, load_frozen_model

SIZE = TinySize(channels=(64, 128))
CAPTIONS = ["a photo of a person", "", "写真 – фото", "word " * 200]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: make_base(root / family, family, SIZE) for family in ("sd1", "sd2", "sdxl")}


def load(path, **changes) -> FrozenModel:
    return load_frozen_model(ModelSettings(base=str(path), precision="fp32", **changes))


def inputs(base: FrozenModel, count: int = 2):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(count, *base.latent_shape(64, 64), generator=generator)
    return noisy, torch.tensor([3, 900])[:count], base.encode_text(CAPTIONS[:count])


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_family(folders, family):
    base = load(folders[family])
    assert isinstance(base, FrozenModel)
    assert base.prediction == ("v" if family == "sd2" else "epsilon")
    assert not any(p.requires_grad for p in base.host.parameters()) and not base.host.training
    moments = base.encode_pixels(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert moments.shape == (2, 8, 8, 8) and base.latent_shape(64, 64) == (4, 8, 8)
    text = base.encode_text(CAPTIONS)
    assert text["states"].shape == (4, 77, base.context_width)
    assert ("pooled" in text) == (family == "sdxl")
    noisy, timesteps, text = inputs(base)
    prediction = base.predict(noisy, timesteps, text)
    assert prediction.shape == noisy.shape and prediction.isfinite().all()
    assert not torch.allclose(prediction, base.predict(noisy, timesteps, {k: v.flip(0) for k, v in text.items()}))
    assert base.decode(noisy).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_target_amounts_to_the_clean_latents(folders, family):
    base = load(folders[family])
    clean, noise, steps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    noisy = base.scheduler.add_noise(clean, noise, steps)
    torch.testing.assert_close(base.clean(noisy, base.target(clean, noise, steps), steps), clean, rtol=1e-3, atol=1e-4)


def test_decoding_has_a_gradient_when_asked(folders):
    base = load(folders["sd1"])
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    assert not base.decode(latents).requires_grad
    pixels = base.decode(latents, gradient=True)
    assert torch.equal(pixels.detach().clamp(-1, 1), base.decode(latents))
    pixels.sum().backward()
    assert latents.grad.abs().min() > 0


def test_latents_are_scaled_samples(folders):
    base = load(folders["sd1"])
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2.0 * torch.tensor(0.5).log())], 1)
    assert base.sample_latents(moments).unique().tolist() == pytest.approx([3.0 * 0.18215])
    sampled = base.sample_latents(moments, torch.full((1, 4, 2, 2), 2.0))
    assert sampled.unique().tolist() == pytest.approx([(3.0 + 0.5 * 2.0) * 0.18215])


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_single_file_is_the_same_model_as_its_folder(folders, family, tmp_path):
    folder = folders[family]
    file = folder_to_single_file(folder, tmp_path / "model.safetensors", family)
    prediction = "v" if family == "sd2" else "auto"
    one, other = load(folder), load(file, tokenizer=str(folder / "tokenizer"), prediction=prediction)
    assert one.prediction == other.prediction
    assert torch.equal(one.scheduler.alphas_cumprod, other.scheduler.alphas_cumprod)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(one.encode_pixels(pixels), other.encode_pixels(pixels))
    assert one.scaling == other.scaling
    own, text = one.encode_text(CAPTIONS), other.encode_text(CAPTIONS)
    assert all(torch.equal(own[name], text[name]) for name in own)
    noisy, timesteps, text = inputs(one)
    assert torch.equal(one.predict(noisy, timesteps, text), other.predict(noisy, timesteps, text))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_encoders_compute_in_full_precision(folders, family, kind, tmp_path):
    """Whatever the number format of the U-Net and under autocast: as the nodes do."""
    path, settings = folders[family], {}
    if kind == "file":
        path = folder_to_single_file(path, tmp_path / "model.safetensors", family)
        settings = {"tokenizer": str(folders[family] / "tokenizer")}
    exact, half = (
        load_frozen_model(ModelSettings(base=str(path), precision=name, **settings)) for name in ("fp32", "bf16")
    )
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    moments, text = exact.encode_pixels(pixels), exact.encode_text(CAPTIONS)
    latents = exact.sample_latents(moments)
    decoded = exact.decode(latents)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(half.encode_pixels(pixels), moments)
            found = half.encode_text(CAPTIONS)
            assert torch.equal(half.decode(latents), decoded)
        assert all(torch.equal(found[name], text[name]) and found[name].dtype == torch.float32 for name in text)
    assert {parameter.dtype for parameter in half.host.parameters()} == {torch.bfloat16}
    assert half.fingerprint(("autoencoder", "text")) == exact.fingerprint(("autoencoder", "text"))


def test_single_file_questions_are_asked(folders, tmp_path):
    file = folder_to_single_file(folders["sd2"], tmp_path / "two.safetensors", "sd2")
    with pytest.raises(TrainerError, match=r"does not say what it predicts.*model\.prediction to v"):
        load(file, tokenizer=str(folders["sd2"] / "tokenizer"))
    with pytest.raises(TrainerError, match=r"carry no vocabulary.*model\.tokenizer.*sd1_tokenizer"):
        load(file, prediction="v")
    with pytest.raises(TrainerError, match=r"has no vocab\.json"):
        load(file, prediction="v", tokenizer=str(tmp_path))
    stated = folder_to_single_file(
        folders["sd2"], tmp_path / "stated.safetensors", "sd2", {"modelspec.prediction_type": "v"}
    )
    assert load(stated, tokenizer=str(folders["sd2"] / "tokenizer")).prediction == "v"


def test_config_folder_describes_a_single_file(folders, tmp_path):
    file = folder_to_single_file(folders["sd2"], tmp_path / "two.safetensors", "sd2")
    base = load(file, config=str(folders["sd2"]))
    assert base.prediction == "v"
    with pytest.raises(TrainerError, match=r"model\.config: .* has no unet/config\.json"):
        load(file, config=str(tmp_path))


def test_wrong_files_are_named(folders, tmp_path):
    with pytest.raises(TrainerError, match=r"nowhere\.safetensors does not exist \(looked in .*model\.allow_hub"):
        load(tmp_path / "nowhere.safetensors")
    with pytest.raises(TrainerError, match="no diffusers folder of a Stable Diffusion: expected a subfolder unet"):
        load(tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(TrainerError, match=r"broken\.safetensors: cannot be read as safetensors"):
        load(broken)
    other = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"lora_unet_up.weight": torch.zeros(1)}, other)
    with pytest.raises(TrainerError, match="is no Stable Diffusion checkpoint.*lora_unet_up"):
        load(other)
    with pytest.raises(TrainerError, match=r"model\.family says Stable Diffusion XL"):
        load(folders["sd1"], family="sdxl")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": {"x": Harm()}}, tmp_path / "model.ckpt")
    with pytest.raises(TrainerError, match="holds code, which is never run"):
        load(tmp_path / "model.ckpt")
    assert not (tmp_path / "ran").exists()


def test_unknown_scheduler_is_refused(folders, tmp_path):
    import shutil

    folder = shutil.copytree(folders["sd1"], tmp_path / "flow")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    with pytest.raises(TrainerError, match="FlowMatchEulerDiscreteScheduler"):
        load(folder)


def test_fingerprint_is_of_the_weights(folders, tmp_path):
    base, again = load(folders["sd1"]), load(folders["sd1"])
    assert base.fingerprint() == again.fingerprint()
    before = base.fingerprint(("host",))
    with torch.no_grad():
        base.host.conv_in.weight += 1e-3
    assert base.fingerprint(("host",)) != before
    assert base.fingerprint(("autoencoder", "text")) == again.fingerprint(("autoencoder", "text"))


def test_released_parts_say_so(folders):
    base = load(folders["sd1"])
    base.release("text", "autoencoder")
    assert base.null_text()["states"].shape == (1, 77, base.context_width)
    with pytest.raises(TrainerError, match="the text component was not loaded, or has been released"):
        base.encode_text(["a"])
    with pytest.raises(TrainerError, match="the autoencoder component"):
        base.decode(torch.zeros(1, 4, 8, 8))


def test_sites(folders):
    base = load(folders["sdxl"])
    assert len(base.sites("all")) > len(base.sites("default"))
    assert base.sites("default", heads=4)[0].heads == 4
    with pytest.raises(TrainerError, match=r"adapter\.heads: 7 does not divide the width 128"):
        base.sites("default", heads=7)
    with pytest.raises(TrainerError, match="has no site 'input_blocks.99'"):
        base.sites(["input_blocks.99"])


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_noise_and_target(folders, family):
    base = load(folders[family])
    timesteps = torch.tensor([400])
    alpha = ((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0))[400].item()
    latents, noise = torch.full((1, 1), 2.0), torch.full((1, 1), -1.0)
    noisy = base.scheduler.add_noise(latents, noise, timesteps)
    assert noisy.item() == pytest.approx(alpha**0.5 * 2 - (1 - alpha) ** 0.5, rel=1e-4)
    velocity = -(alpha**0.5) - (1 - alpha) ** 0.5 * 2
    expected = velocity if family == "sd2" else -1.0
    assert base.target(latents, noise, timesteps).item() == pytest.approx(expected, rel=1e-4)
