"""The parts of the small model: its tokenizer, its optimiser, its networks and their stages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples.small_model import (
    autoencoder,
    denoiser,
    drawing,
    examiner,
    identity,
    people,
    settings,
    system,
    text,
    training,
)
from examples.small_model.build import Build
from examples.small_model.muon import orthogonalise
from trainer.errors import TrainerError
from trainer.training.checkpoint import load_latest

POSITIONS = "embeddings.position_embedding.weight"


@pytest.mark.parametrize("name", ["small.yaml", "small128.yaml"])
def test_recipes_are_complete(name):
    recipe = settings.load([], settings.FILE.with_name(name))
    assert {"train", "heldout", "heldout-equal", "second", "second-equal", "examiner"} <= set(recipe.people.splits)
    assert recipe.pictures <= recipe.people.splits["train"].identities * recipe.people.splits["train"].pictures
    assert recipe.crop % recipe.encoder.patch == 0
    assert denoiser.create(recipe.people.size, recipe.unet.widths).config.sample_size == recipe.people.size // 8


def test_every_word_of_a_caption_is_one_token(tmp_path):
    tokenizer = text.write_tokenizer(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(50):
        caption = people.caption(people.scene_of(rng))
        words = caption.replace(",", " ,").replace("-", " - ").split()
        ids = tokenizer(caption).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == [text.START, *(w + "</w>" for w in words), text.END]
    assert text.tokenize(tokenizer, ["a person", ""]).shape == (2, text.LENGTH)


def test_muon_makes_orthogonal_updates():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(24, 60)))
    assert 0.6 < values.min() and values.max() < 1.3


def _train(folder: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    optimiser = {"lr": 1e-2, "warmup_steps": 5, "schedule": "cosine"}
    stage = settings.Stage(steps=40, batch_size=16, checkpoint_every=10, log_every=10, optimiser=optimiser)

    def losses(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        if step == stop_at:
            raise RuntimeError("broken off")
        x = torch.from_numpy(rng.standard_normal((16, 4))).float() + 0.01 * torch.randn(16, 4)
        wrong = ((model(x) - x.flip(1)) ** 2).mean()
        return {"loss": wrong, "twice": 2 * wrong}

    return training.train(folder, model, stage, losses).state_dict()


def test_an_interrupted_stage_ends_with_the_same_weights(tmp_path, alone):
    whole = _train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="broken off"):
        _train(tmp_path / "parts", stop_at=23)
    assert load_latest(tmp_path / "parts").step == 23
    resumed = _train(tmp_path / "parts")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    last, again = (json.loads(lines[-1]) for lines in logs)
    assert last["step"] == again["step"] == 40 and last["twice"] == pytest.approx(2 * last["loss"])
    assert torch.equal(whole["0.weight"], load_latest(tmp_path / "whole").weights("ema")["0.weight"])


def test_crops_agree_with_the_crops_of_the_core():
    from feedface_core.faces.crop import crop_face

    # a smooth picture, so that bilinear and bicubic resampling agree
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    picture = torch.stack([x, y, (x + y) / 2], -1)  # (H, W, 3)
    box = (20.0, 14.0, 44.0, 50.0)
    ours = identity.crops(picture.movedim(-1, 0)[None] * 2 - 1, torch.tensor([box]), 48)[0]
    core = crop_face(picture, box, size=48).movedim(-1, 0) * 2 - 1
    assert (ours - core).abs().max() < 0.02


@torch.no_grad()
def test_autoencoder_is_standardised_without_changing_what_it_does():
    rng = np.random.default_rng(0)
    pictures = drawing.to_pixels(rng.integers(0, 256, (32, 64, 64, 3), dtype=np.uint8))
    model = autoencoder.create().eval()
    x = pictures[:2]
    before = model.decode(model.encode(x).latent_dist.mean).sample
    spread = model.encode(x).latent_dist
    autoencoder.standardise(model, pictures.split(8))
    after = model.encode(x).latent_dist
    means = model.encode(pictures).latent_dist.mean * autoencoder.SCALE
    assert torch.allclose(model.decode(after.mean).sample, before, atol=1e-4)
    assert means.mean((0, 2, 3)).abs().max() < 1e-3
    assert means.std().item() == pytest.approx(1.0, abs=0.01)
    # mean and spread grew by the same factor
    factor = after.std.mean() / spread.std.mean()
    assert factor.item() == pytest.approx((after.mean.std() / spread.mean.std()).item(), rel=0.3)


@torch.no_grad()
def test_an_autoencoder_that_starts_from_another_keeps_its_latents(tmp_path, alone, monkeypatch):
    people_ = _painted(monkeypatch, 24)
    autoencoder.create().save_pretrained(tmp_path / "vae")
    optimiser = {"lr": 1e-3, "warmup_steps": 0}
    stage = settings.AutoencoderStage(steps=2, batch_size=2, optimiser=optimiser)
    start, other = (autoencoder.start_from(tmp_path / "vae", people_) for _ in range(2))
    with torch.enable_grad():
        trained = autoencoder.train_autoencoder(people_, tmp_path / "run", stage, other)
    x = people_.pixels(range(2))
    assert torch.equal(start.encode(x).latent_dist.mean, trained.encode(x).latent_dist.mean)
    assert not torch.equal(start.decoder.conv_out.weight, trained.decoder.conv_out.weight)
    encoded = autoencoder.encode_all(lambda: start, people_, tmp_path / "latents")
    assert encoded["latents"].shape == (24, 32, 8, 8) and encoded["faces"].shape == (24, 1, 8, 8)
    kept = autoencoder.encode_all(None, people_, tmp_path / "latents")  # nothing to encode
    assert torch.equal(kept["latents"], encoded["latents"])


def _painted(monkeypatch, count: int) -> drawing.People:
    """People whose pictures are noise, for what only needs their shapes."""
    rng = np.random.default_rng(0)
    pictures = drawing.to_pixels(rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))
    masks = torch.from_numpy(rng.random((count, 1, 64, 64))).float()
    monkeypatch.setattr(drawing.People, "pixels", lambda self, index: pictures[list(index)])
    monkeypatch.setattr(drawing.People, "masks", lambda self, index: masks[list(index)])
    scenes = [people.scene_of(np.random.default_rng(i)) for i in range(count)]
    return drawing.People(Path(), [{"width": 64, "height": 64, **scene} for scene in scenes])


def test_a_wrong_word_costs_nothing_where_captions_change_nothing(tmp_path, monkeypatch):
    people_ = _painted(monkeypatch, 16)
    model = denoiser.TextToImage(text.write_tokenizer(tmp_path)).eval()
    encoded = {"latents": torch.randn(16, 32, 8, 8), "faces": torch.rand(16, 1, 8, 8)}
    costs = denoiser.cost_of_wrong_words(model, people_, encoded)
    assert set(costs) == set(people.ATTRIBUTES) and any(rise != 0 for _, rise, _ in costs.values())
    for name, module in model.unet.named_modules():
        if name.endswith("attn2"):
            nn.init.zeros_(module.to_v.weight)  # the text cannot come through
    assert all(rise == 0 for _, rise, _ in denoiser.cost_of_wrong_words(model, people_, encoded).values())


def test_the_encoder_tells_features_of_a_person_but_not_colours_it_changed(tmp_path, alone, monkeypatch):
    people_, rng = _painted(monkeypatch, 8), np.random.default_rng(0)
    chosen = {name: rng.choice([f"{name} {i}" for i in range(3)], 4) for name in people.FEATURES}
    for i, record in enumerate(people_.records):
        shown = {name: str(values[i // 2]) for name, values in chosen.items()}
        record |= {"identity": f"{i // 2}", "box": [8, 8, 56, 56], "features": shown}
    values, numbers = people_.features()
    for name in people.FEATURES:
        assert [values[name][i] for i in numbers[name]] == [r["features"][name] for r in people_.records]
    index, recolored = np.array([3, 0, 5]), torch.tensor([True, False, True])
    left = identity.visible(numbers, index, recolored)
    for name, those in left.items():
        hidden = recolored.numpy() & (name in ("skin", "hair color"))
        assert np.array_equal(those, np.where(hidden, -100, numbers[name][index]))
    optimiser = {"lr": 1e-3, "warmup_steps": 0}
    stage = settings.EncoderStage(steps=2, batch_size=4, log_every=1, optimiser=optimiser, recolored=1)
    with torch.enable_grad():
        plain, told = (
            identity.train_encoder(
                people_, tmp_path / str(weight), stage.model_copy(update={"feature_weight": weight}), 48
            )
            for weight in (0.0, 2.0)
        )
    lines = [json.loads(line) for line in (tmp_path / "2.0/log.jsonl").read_text("utf-8").splitlines()]
    assert [line["features"] > 0 and 0 <= line["features read"] <= 1 for line in lines] == [True, True]
    assert not torch.equal(plain.state_dict()[POSITIONS], told.state_dict()[POSITIONS])


def test_stages_go_on_from_the_weights_of_another_model(tmp_path, alone, monkeypatch):
    people_ = _painted(monkeypatch, 4)
    for i, record in enumerate(people_.records):
        record |= {"identity": f"{i // 2}", "box": [8, 8, 56, 56]}
    stage = settings.EncoderStage(steps=1, batch_size=2, ema=0.0, optimiser={"lr": 1e-9, "warmup_steps": 0})
    shipped = system.encoder_of(system.FOLDER / system.ADAPTER)
    with torch.enable_grad():
        trained = identity.train_encoder(people_, tmp_path / "encoder", stage, 48, shipped.state_dict())
    torch.testing.assert_close(trained.state_dict(), shipped.state_dict(), rtol=0, atol=1e-6)

    chosen = settings.load([f"unet.start={system.FOLDER}", f"adapter_start={system.FOLDER}"])
    going_on = Build(tmp_path, tmp_path / "published", chosen)
    shipped_unet = system.load_text_to_image(system.FOLDER).state_dict()
    torch.testing.assert_close(going_on.untrained().state_dict(), shipped_unet, rtol=0, atol=0)
    assert going_on.start_of("full") == ["adapter.init=adapters/full-start.safetensors"]
    assert (tmp_path / "adapters/full-start.safetensors").read_bytes() == (system.FOLDER / system.ADAPTER).read_bytes()
    assert not going_on.start_of("full-seed1") and not going_on.start_of("several") and not going_on.start_of("light")

    anew = Build(tmp_path, tmp_path / "published", settings.load(["unet.start=null", "adapter_start=null"]))
    assert anew.start_of("full") == []
    assert not torch.equal(anew.untrained().unet.conv_in.weight, going_on.untrained().unet.conv_in.weight)


def test_recolouring_stays_within_the_mask():
    rng = np.random.default_rng(0)
    x, mask = torch.rand(2, 3, 64, 64) * 2 - 1, torch.zeros(2, 1, 64, 64)
    mask[1, :, 20:40, 20:40] = 1
    other = identity.recolor(x, mask, rng)
    assert torch.equal(other[0], x[0]) and torch.equal(other[1, :, :20], x[1, :, :20])
    assert (other[1, :, 20:40, 20:40] - x[1, :, 20:40, 20:40]).abs().mean() > 0.02


def test_eyes_are_two_similar_ones_on_a_level():
    def picture(*spots: tuple[int, int, int]) -> np.ndarray:
        logits = np.full((32, 32), -5.0)
        for y, x, side in spots:
            logits[y : y + side, x : x + side] = 5
        return logits

    cases = {
        "two": (picture((10, 8, 3), (11, 18, 3)), True),
        "one": (picture((10, 8, 3)), False),
        "three": (picture((10, 8, 3), (10, 18, 3), (20, 8, 3)), False),
        "unlike": (picture((10, 8, 4), (10, 18, 2)), False),
        "aslant": (picture((10, 8, 3), (15, 18, 3)), False),
        "none": (picture(), False),
    }
    found = examiner.two_eyes(np.stack([logits for logits, _ in cases.values()]))
    assert dict(zip(cases, found, strict=True)) == {name: wanted for name, (_, wanted) in cases.items()}


def test_a_spoilt_eye_changes_and_its_surroundings_stay():
    for seed in range(12):
        x = torch.rand(3, 64, 64)
        before = x.clone()
        examiner.spoil(x, (30.0, 20.0), 5.0, np.random.default_rng(seed))
        changed = (x != before).any(0)
        assert changed[18:22, 28:32].any()
        assert not changed[:12].any() and not changed[28:].any() and not changed[:, :22].any()


def test_the_published_model_stands_in_for_its_stages(tmp_path):
    """Another adapter can then be trained for it: base, and the face encoder that the adapter file carries."""
    from feedface_core.files.adapter_file import load_adapter
    from trainer.config.training import EncoderSettings
    from trainer.models.face_encoder import load_face_encoder

    build = Build(tmp_path, system.FOLDER, settings.load())
    build.published()
    assert (tmp_path / "output/unet/diffusion_pytorch_model.safetensors").is_file()
    wanted = load_adapter(system.FOLDER / system.ADAPTER)
    chosen = {"image_size": 48, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "name": "feedface-small"}
    found = load_face_encoder(EncoderSettings(path=str(tmp_path / "output/face_encoder"), **chosen))
    assert found.config.fingerprint == wanted.config.encoder.fingerprint


def test_training_that_leaves_no_file_is_refused_before_it_begins():
    """Of the shipped recipe every part of every training has its checkpoint."""
    from examples.small_model.build import CONFIG
    from examples.small_model.variants import steps_of_files
    from trainer.config import load_config

    recipe = settings.load()
    for variant in ("full", *recipe.variants):
        found = load_config(CONFIG, recipe.variants.get(variant, recipe.adapter)).train
        assert steps_of_files(variant, found)[100] == found.steps
    with pytest.raises(TrainerError, match=r"light: .* 25 % of train\.steps=1500, .*checkpoint_every=250 .* step 375"):
        steps_of_files("light", load_config(CONFIG, ["train.steps=1500"]).train)
