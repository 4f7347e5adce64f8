"""Sites of Stable Diffusion's U-Nets, read off the models, and branches through forward hooks."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from feedface_core.conditioning import Face
from feedface_core.config import AdapterConfig, EncoderConfig
from feedface_core.errors import FeedFaceError
from feedface_core.hosts import family, list_sites, match_sites
from feedface_core.hosts.hooks import BranchHooks
from feedface_core.hosts.sd_unet import default_sites
from feedface_core.modules.adapter import FaceAdapter

ENCODER = EncoderConfig(config={"hidden_size": 12, "patch_size": 112})
SD15_SITES = [
    *(f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)),
    "middle_block.1",
    *(f"output_blocks.{i}.1" for i in range(3, 12)),
]


def unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    options = {
        "block_out_channels": (32, 64, 64, 64),
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "sample_size": 16,
        **changes,
    }
    return UNet2DConditionModel(**options).requires_grad_(False)


def true_size(**options) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**options)


SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    "options, name, count, widths",
    [
        (SD15, "sd1", 16, [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3),
        (SD21, "sd2", 16, [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3),
        (SDXL, "sdxl", 11, [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3),
    ],
)
def test_published_models(options, name, count, widths):
    model = true_size(**options)
    sites = default_sites(model)
    assert family(model) == name
    assert [site.width for site in sites] == widths and len(sites) == count


def test_names_are_the_paths_of_the_original_layout():
    assert [site.name for site in list_sites(true_size(**SD15))] == [f"{p}.transformer_blocks.0" for p in SD15_SITES]
    names = [site.name for site in list_sites(true_size(**SDXL))]
    assert len(names) == 70
    assert names[:3] == [f"input_blocks.4.1.transformer_blocks.{i}" for i in (0, 1)] + [
        "input_blocks.5.1.transformer_blocks.0"
    ]
    assert names[-1] == "output_blocks.5.1.transformer_blocks.1"
    assert default_sites(true_size(**SDXL))[2].name == "input_blocks.7.1.transformer_blocks.9"


def test_parameters_of_the_branches_of_stable_diffusion_15():
    config = AdapterConfig("sd1", default_sites(true_size(**SD15)), 768)
    adapter = FaceAdapter(config, device="meta")
    assert sum(p.numel() for p in adapter.branches.parameters()) == pytest.approx(255e6, rel=0.005)


def test_other_models_are_refused_by_what_they_are():
    with pytest.raises(FeedFaceError, match="Linear is not a model FeedFace can attach to; it knows Stable"):
        list_sites(torch.nn.Linear(2, 2))


def adapter_for(model, **fields) -> FaceAdapter:
    torch.manual_seed(1)
    config = AdapterConfig(
        **{"host": family(model), "sites": default_sites(model), "context_width": 16, "encoder": ENCODER, **fields}
    )
    adapter = FaceAdapter(config)
    for branch in adapter.branches:
        torch.nn.init.normal_(branch.zero_linear.weight, std=0.1)
    return adapter


def test_the_wrong_model_is_named_on_both_sides():
    small, sdxl = unet(), true_size(**SDXL)
    with pytest.raises(
        ValueError,
        match=r"(?s)my.safetensors was made for a U-Net with Stable Diffusion's layout with "
        r"16 sites of widths \[32, 64\], but this model is Stable Diffusion XL with "
        r"70 sites of widths \[640, 1280\].*Load the model",
    ):
        match_sites(adapter_for(small).config, sdxl, "my.safetensors")
    wider = unet(block_out_channels=(32, 96, 96, 96))
    with pytest.raises(ValueError, match="is 96 wide, not 64"):
        match_sites(adapter_for(small).config, wider)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_reach_the_rows_with_a_face_and_train_the_branches(checkpointing):
    model = unet()
    adapter = adapter_for(model)
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([7, 7]), torch.randn(2, 5, 24)
    plain = model(x, t, text).sample
    hooks = BranchHooks(model, adapter)
    assert torch.equal(model(x, t, text).sample, plain)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    control = adapter.control_of(Face(torch.randn(2, 5, 12)), "cpu", torch.float32)
    with hooks.faces([(1, None), (1, control)]):
        out = model(x, t, text).sample
        out.square().mean().backward()
    assert torch.equal(out[0], plain[0]) and (out[1] - plain[1]).abs().max() > 1e-3
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    hooks.remove()
    model.eval()
    with hooks.faces([(2, control)]):
        assert torch.equal(model(x, t, text).sample, plain)
