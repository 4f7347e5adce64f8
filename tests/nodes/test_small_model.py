"""The small system as MODEL, CLIP and VAE: the same numbers as its diffusers parts, here with random weights."""

from __future__ import annotations

import pytest
import torch

CAPTION = "a close-up of an angry person wearing glasses and a red shirt, plain blue background"


@pytest.fixture(scope="module", params=[(64, (128, 128))], ids=["64"])
def parts(comfy, tmp_path_factory, request):
    """A folder with an untrained small system, its parts, and the node's module."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from examples.small_model import autoencoder, denoiser, settings, system, text

    size, widths = request.param
    folder = tmp_path_factory.mktemp("small")
    tokenizer = text.write_tokenizer(folder / "words")
    model, people = denoiser.TextToImage(tokenizer, size, widths), settings.load().people
    system.save_pipeline(folder, autoencoder.create(size), model.unet, model.text_encoder, people)
    return {
        "size": size,
        "folder": folder,
        "node": comfy.module("nodes.small_model"),
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").float(),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae").float(),
        "text": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    }


@torch.no_grad()
def test_text_states_agree_with_transformers(parts):
    from examples.small_model.text import tokenize

    clip = parts["node"].load_clip(parts["folder"])
    expected = parts["text"](tokenize(parts["tokenizer"], [CAPTION])).last_hidden_state
    found = clip.encode_from_tokens_scheduled(clip.tokenize(CAPTION))[0][0]
    assert found.shape == (1, 32, 128)
    assert (found - expected).abs().max() < 1e-4


def test_nothing_is_left_uninitialised(parts):
    """Checkpoint Save writes every weight, those that the system has no file for too."""
    node, folder = parts["node"], parts["folder"]
    weights = {
        **node.load_clip(folder).get_sd(),
        **node.load_vae(folder).get_sd(),
        **node.load_model(folder).model.diffusion_model.state_dict(),
    }
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    projection = next(weight for name, weight in weights.items() if name.endswith("text_projection.weight"))
    assert torch.equal(projection.float(), torch.eye(128))


@torch.no_grad()
def test_prediction_agrees_with_diffusers(parts):
    model = parts["node"].load_model(parts["folder"])
    unet = model.model.diffusion_model.float()
    x = torch.randn(2, 16, parts["size"] // 8, parts["size"] // 8, generator=torch.Generator().manual_seed(0))
    states = torch.randn(2, 32, 128, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([900, 20])
    expected = parts["unet"](x, times, states).sample
    assert (unet(x, times, context=states) - expected).abs().max() < 1e-4
    assert model.model.latent_format.latent_channels == 16
    assert model.model.concat_keys == ()  # more than four channels, and still no inpainting model


def test_the_host_code_finds_the_same_sites_in_both(parts, comfy):
    hosts = comfy.module("feedface_core.hosts.sd_unet")
    ours = parts["node"].load_model(parts["folder"]).model.diffusion_model
    names = [site.name for site in hosts.list_sites(ours)]
    assert names == [site.name for site in hosts.list_sites(parts["unet"])]
    assert len(names) == 7
    assert hosts.family(ours) == "sd_unet"


@torch.no_grad()
def test_autoencoder_agrees_with_diffusers(parts):
    vae = parts["node"].load_vae(parts["folder"])
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    decoded = (parts["vae"].decode(latent).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert (vae.decode(latent) - decoded).abs().max() < 1e-4
    mean = parts["vae"].encode(pictures.movedim(-1, 1) * 2 - 1).latent_dist.mean
    assert (vae.encode(pictures) - mean).abs().max() < 1e-4
