"""Training the U-Net along with an adapter: a LoRA on it, or all of it; and that ComfyUI uses what comes out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapter_kinds import FULL, LORA, TEXT, UNETS, batch_of, config_of, first_of, train_whole_and_in_parts
from support.comfy_unet import comfy_model, run_in_comfyui
from support.evaluation import make_small
from support.small_training import make_models, make_photos, weights

from feedface_core.conditioning import Face
from feedface_core.files.adapter_file import load_adapter, save_adapter
from feedface_core.text_tokens import replace_rows
from tools.tiny_diffusers import TinySize
from trainer import export, train
from trainer.config import ModelSettings
from trainer.errors import TrainerError
from trainer.evaluate.drawing import Painter
from trainer.evaluate.memo import Memo
from trainer.evaluate.subject import Subject
from trainer.models.adapter import load_models
from trainer.models.frozen_model import load_frozen_model
from trainer.training.plan import estimate
from trainer.training.step import AdapterStep


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("unet")
    size = TinySize(channels=(32, 64), context=32)
    return make_models(root / "models", size=size), make_photos(root / "photos")


def change(models, seed=4):
    """As if it had been trained: a LoRA that does something, and other weights of the U-Net."""
    generator = torch.Generator().manual_seed(seed)
    for value in models.unet.trained().values():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", UNETS)
def test_it_learns_and_goes_on_where_it_stopped(files, tmp_path, kind):
    last = train_whole_and_in_parts(files, tmp_path, kind)
    of_unet = [name for name in last if name.startswith("unet.")]
    assert of_unet and all(".lora_" in name for name in of_unet) == (kind != "all")


@pytest.mark.parametrize("dropped", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", UNETS)
def test_the_gradient_goes_there_and_only_there(files, tmp_path, kind, dropped):
    models = load_models(config := config_of(files, tmp_path, kind, loss__face_dropout=dropped), "cpu")
    change(models)
    step, trained = AdapterStep(models, config.loss), models.unet.trained()
    loss, record = step(batch_of(config, models)[1])
    loss.backward()
    assert len(record.losses) == 6, "a dropped face teaches the U-Net"
    assert all(value.grad is not None for value in models.adapter.parameters())
    assert all(bool(value.grad.any()) for value in trained.values())
    others = [value for name, value in models.frozen.host.named_parameters() if name not in trained]
    assert all(value.grad is None and not value.requires_grad for value in others)
    assert bool(others) == (kind != "all")
    assert {value for value in step.parameters() if value.requires_grad} == {
        *models.adapter.parameters(),
        *trained.values(),
    }


def test_a_lora_starts_as_nothing_and_is_held_to_the_released_model(files, tmp_path):
    released = load_models(config_of(files, tmp_path, **TEXT), "cpu").frozen
    models = load_models(config_of(files, tmp_path, "LoRA"), "cpu")
    own, noisy = models.frozen, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = (noisy, torch.tensor([700, 20]), released.encode_text(["a person", ""]))
    with torch.no_grad():
        expected = released.predict(*inputs)
        assert torch.equal(own.predict(*inputs), expected)
        change(models)
        assert not torch.allclose(own.predict(*inputs), expected, rtol=1e-2)
        with models.unet.as_released():
            assert torch.equal(own.predict(*inputs), expected)
        assert not torch.allclose(own.predict(*inputs), expected, rtol=1e-2)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", UNETS)
def test_comfyui_draws_what_the_trainer_does(comfy, files, tmp_path, kind):
    """The exported files, loaded by ComfyUI's own code, give the prediction of the model that was trained."""
    config = config_of(files, tmp_path / "run", kind, train__ema=None, optimiser__lr=0.02, train__steps=3)
    assert train.train(config)
    path = export.export(tmp_path / "run", tmp_path / "me.safetensors", precision="fp32")
    beside = tmp_path / f"me_{'unet' if kind == 'all' else 'lora'}.safetensors"
    assert beside.name in load_adapter(path).summary()
    with safe_open(beside, "pt") as file:
        assert "me.safetensors" in file.metadata()["modelspec.description"]

    models, released = load_models(config, "cpu"), load_frozen_model(config.model)
    models.trained.load_state_dict(weights(tmp_path / "run", 3))
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    timesteps, text = torch.tensor([700, 20]), released.encode_text(["a person", ""])
    crops = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    control = models.adapter.control_of(Face(models.encoder.encode(crops)), "cpu", torch.float32, strength=0.7)
    with torch.no_grad():
        plain = released.predict(noisy, timesteps, text)
        ours = models.frozen.predict(noisy, timesteps, text, [(1, None), (1, control)])
        again = load_frozen_model(ModelSettings(base=config.model.base, precision="fp32", unet=str(beside)))
        merged = again.predict(noisy, timesteps, text)
    scale = plain.abs().max()
    assert (ours[0] - plain[0]).abs().max() / scale > 0.01, "the U-Net has learned"
    assert (merged[0] - ours[0]).abs().max() / scale < 1e-4, "model.unet"

    host = comfy_model(released.host)
    before = diffusion(host, noisy, timesteps, text)
    changed = with_file(host, beside, kind)
    loaded = comfy.module("nodes.adapter").LoadedAdapter(str(path))
    core = comfy.module("feedface_core.conditioning")
    if loaded.config.text_tokens:  # in a run the node's wrapper puts the face into the text, as this does
        face = {"states": replace_rows(text["states"], [(1, None), (1, control)])}
        theirs = diffusion(changed, noisy, timesteps, face)
    else:
        theirs = run_in_comfyui(comfy, changed, loaded, core, crops, noisy, timesteps, text)
    assert (theirs - ours).abs().max() / scale < 1e-4
    assert torch.equal(diffusion(host, noisy, timesteps, text), before), "taken off, the model is what it was"


def with_file(host, path, kind):
    """The model with the file that lies beside an adapter, as Load LoRA or Load Diffusion Model does it."""
    import comfy.model_detection
    import comfy.sd

    tensors = load_file(path)
    if kind != "all":
        changed, _ = comfy.sd.load_lora_for_models(host, None, tensors, 1.0, 0.0)
        patched = sum(name.endswith("lora_up.weight") for name in tensors)
        assert len(changed.patches) == patched > 0
        return changed
    assert comfy.model_detection.unet_prefix_from_state_dict(tensors) == "model.diffusion_model."
    return comfy_model(weights=tensors)


def diffusion(patcher, noisy, timesteps, text):
    patcher.patch_model(torch.device("cpu"))
    try:
        with torch.no_grad():
            return patcher.model.diffusion_model(noisy, timesteps, text["states"])
    finally:
        patcher.unpatch_model(torch.device("cpu"))


@pytest.mark.parametrize("kind", first_of(UNETS))
def test_the_plan_counts_it(files, tmp_path, kind):
    models = load_models(config := config_of(files, tmp_path, kind), "cpu")
    found, plain = estimate(config), estimate(config_of(files, tmp_path, **({} if "branches" in kind else TEXT)))
    unet = sum(value.numel() for value in models.unet.trained().values())
    assert found.trained == plain.trained + unet
    assert found.optimiser - plain.optimiser == 8 * unet and found.checkpoints > plain.checkpoints


REFUSED = {
    "nothing frozen to hold to": ({"train__unet": "full"}, "train.unet=full.*loss.kind=regularised"),
    "a LoRA for nothing": ({"adapter__lora": {"rank": 2}}, "adapter.lora is given, but train.unet is frozen"),
    "rank": ({**LORA, "adapter__lora": {"rank": 0}}, "adapter.lora.rank"),
    "targets": ({**LORA, "adapter__lora": {"targets": ["to_x"]}}, "adapter.lora.targets: .*'to_x'.*to_q"),
    "kind": ({"train__unet": "half"}, "train.unet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_by_name(files, tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(TrainerError, match=message):
        load_models(config_of(files, tmp_path, **changes), "cpu")


@pytest.mark.usefixtures("alone")
def test_a_run_goes_on_as_it_began(files, tmp_path):
    assert train.train(config_of(files, tmp_path, "LoRA", train__steps=2))
    for changes in ({**LORA, "adapter__lora": {"rank": 4}}, {}, FULL):
        with pytest.raises(TrainerError, match="was trained with .*lora.*these settings make"):
            train.train(config_of(files, tmp_path, **{**TEXT, **changes}))


FILES_REFUSED = {
    "another U-Net": lambda path: {"lora_unet_x.lora_up.weight": torch.zeros(2, 1)},
    "another width": lambda path: {
        f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_{end}.weight": torch.zeros(shape)
        for end, shape in (("up", (5, 1)), ("down", (1, 5)))
    },
    "half a LoRA": lambda path: {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": torch.zeros(64, 1)
    },
    "no U-Net": lambda path: {"projection.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("case", FILES_REFUSED)
def test_model_unet_refuses_by_name(files, tmp_path, case):
    save_file(FILES_REFUSED[case](tmp_path), path := tmp_path / "x.safetensors")
    with pytest.raises(TrainerError, match=r"model.unet: .*x.safetensors"):
        load_frozen_model(ModelSettings(base=str(files[0] / "base"), precision="fp32", unet=str(path)))


def test_unidiffuser_has_no_unet():
    from trainer.models.unet import train_unet

    frozen = SimpleNamespace(host=torch.nn.Linear(2, 2), name="uvit_v1")
    config = SimpleNamespace(train=SimpleNamespace(unet="full", seed=0), adapter=SimpleNamespace(lora=None))
    with pytest.raises(TrainerError, match="train.unet=full: uvit_v1 is UniDiffuser"):
        train_unet(config, frozen)


def test_an_evaluation_says_which_file_is_missing(tmp_path, caplog):
    small = make_small(tmp_path)
    found = load_adapter(small.adapter)
    told = {"unet.kind": "lora", "unet.file": "face_lora.safetensors"}
    save_adapter(small.adapter, found.config, found.tensors, found.encoder_tensors, told)
    settings = small.settings(tmp_path / "out")
    Painter(settings, Subject(settings, tmp_path / "out"), tmp_path / "out", Memo(tmp_path / "memo.jsonl"))
    assert f"model.unet={tmp_path / 'face_lora.safetensors'}" in caplog.text
