"""The published training: its settings, its loss, and a run with them at a small size."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from support.small_training import make_photos, moved, weights
from torch import Tensor

from feedface_core.files.adapter_file import load_adapter
from feedface_core.modules.uvit import UViT
from tools.tiny_diffusers import TinySize, make_base, make_encoder
from trainer import export, train
from trainer.cache import make_cache
from trainer.config import Config, load_config
from trainer.data.batch import collate
from trainer.data.dataset import FaceDataset, TensorShapes
from trainer.data.manifest import read_manifest
from trainer.models.adapter import load_models
from trainer.models.unidiffuser import unpack
from trainer.training.step import AdapterStep

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
PAPER = ROOT / "trainer" / "configs" / "paper.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Small models in the published layout, and photos of people with several photos each."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("paper")
    for name in ("uvit.pth", "caption_decoder.pth", "config.json"):
        shutil.copy(GOLDEN / name, folder)
    make_base(folder / "sd", "sd1", TinySize(context=768, text_layers=1))
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = {**small, "num_hidden_layers": 2, "image_size": 64, "patch_size": 32}
    model = CLIPModel(
        CLIPConfig(vision_config=vision, text_config={**small, "num_hidden_layers": 1}, projection_dim=512)
    )
    model.save_pretrained(folder / "clip")
    make_encoder(folder / "face_encoder", image_size=64)
    make_photos(folder / "photos")
    return folder


def small(files: Path, output: Path, *more: str) -> Config:
    """The published settings on the small models, on the CPU."""
    return load_config(
        PAPER,
        [
            f"model.base={files / 'uvit.pth'}",
            f"model.caption_decoder={files / 'caption_decoder.pth'}",
            f"model.stable_diffusion={files / 'sd'}",
            f"model.image_encoder={files / 'clip'}",
            "model.precision=fp32",
            f"adapter.encoder.path={files / 'face_encoder'}",
            "adapter.encoder.image_size=64",
            f"data.manifest={files / 'photos' / 'manifest.jsonl'}",
            "data.resolution=64",
            "data.workers=0",
            f"train.output={output}",
            "train.steps=4",
            "train.batch_size=6",
            "train.checkpoint_every=2",
            "train.tracker=none",
            "optimiser.lr=1e-3",
            "optimiser.warmup_steps=1",
            *([] if any(one.startswith("data.cache=") for one in more) else ["data.cache=null"]),
            *more,
        ],
    )


def test_settings_are_the_published_ones():
    config = load_config(PAPER)
    assert (config.model.family, config.model.precision, config.model.data_type) == ("unidiffuser", "fp16", 0)
    adapter, encoder = config.adapter, config.adapter.encoder
    assert (adapter.sites, adapter.tap, adapter.null, adapter.depth) == ("default", "output", "zero_crop", 1)
    assert adapter.self_attention and adapter.heads is None and adapter.combination == "concat"
    assert encoder.image_mean == encoder.image_std == (0.5, 0.5, 0.5)
    assert (encoder.layer, encoder.image_size, encoder.included) == (-2, 224, True)
    data, loss = config.data, config.loss
    assert (data.references, data.retrieval, data.augment_variants, data.repeat) == (1, False, 0, 10)
    assert not data.flip and data.mirrors_references and data.resolution == 512
    assert (loss.kind, loss.normalise, loss.image_token_weight) == ("regularised", "average", 0.0)
    assert (loss.standard_probability, loss.face_dropout, loss.text_dropout) == (0.1, 0.1, 0.0)
    assert loss.min_snr_gamma is None
    optimiser = config.optimiser
    assert (optimiser.lr, optimiser.betas, optimiser.weight_decay) == (2e-5, (0.9, 0.9), 0.03)
    assert (optimiser.warmup_steps, optimiser.schedule, optimiser.clip) == (100, "constant", None)
    assert (config.train.steps, config.train.batch_size, config.train.ema) == (50_000, 96, None)
    assert config.train.steps * config.train.batch_size == 4_800_000
    assert config.train.batch_size % (6 * optimiser.accumulation) == 0  # of six GPUs


def test_every_setting_has_its_source():
    """A setting of the published training without [paper], [code] or [weights] would be somebody's guess."""
    own = {
        "family",
        "caption_decoder",
        "stable_diffusion",
        "image_encoder",
        "path",
        "title",
        "cache",
        "workers",
        "schedule",
        "output",
        "checkpoint_every",
        "keep",
    }
    for line in PAPER.read_text(encoding="utf-8").splitlines():
        name, colon, rest = line.strip().partition(":")
        if not colon or line.startswith("#") or name.startswith("#") or not rest.strip():
            continue
        assert name in own or re.search(r"\[(paper|code|weights)[],]", rest), line


class Case:
    """The step of the published settings on six samples, with decisions set by hand."""

    def __init__(self, files, tmp_path, *more):
        config = small(files, tmp_path, "loss.face_dropout=0.4", *more)
        self.models = load_models(config, "cpu")
        torch.manual_seed(0)
        for branch in self.models.adapter.branches:
            torch.nn.init.normal_(branch.zero_linear.weight, std=0.2)
        records, _ = read_manifest(config.data.manifest)
        dataset = FaceDataset(records, config, TensorShapes.of(self.models.frozen, 64))
        self.batch = collate([dataset[index, 0] for index in range(6)])
        self.batch.standard_loss = [False, True, False, False, True, False]
        self.step = AdapterStep(self.models, config.loss)

    def loss(self):
        loss, record = self.step(self.batch)
        return self.step.plan(self.batch), loss, record.losses


def test_loss_is_the_published_one(files, tmp_path, monkeypatch):
    """mean(d²·mask) + mean(d_orig²·(1 − mask)) over the picture latent alone, or mean(d²)."""
    case = Case(files, tmp_path)
    assert 0 < sum(case.batch.drop_face) < 6
    assert case.batch.reference_counts == [0 if dropped else 1 for dropped in case.batch.drop_face]
    predictions: list[Tensor] = []
    predict = case.models.frozen.predict
    monkeypatch.setattr(case.models.frozen, "predict", lambda *a: predictions.append(predict(*a)) or predictions[-1])
    plan, loss, losses = case.loss()
    assert len(plan.rows) == 6  # dropped faces are trained, as the crop of zeros
    original, prediction = (unpack(one, 512)[0] for one in predictions)
    for place, row in enumerate(plan.rows):
        noise, mask = unpack(case.batch.noise[row : row + 1], 512)[0][0], case.batch.masks[row]
        error = (noise - prediction[place]).square()
        expected = error.mean()
        if not case.batch.standard_loss[row]:
            outside = (original[plan.originals.index(place)] - prediction[place]).square()
            expected = (error * mask).mean() + (outside * (1 - mask)).mean()
        assert losses[place].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    with_token = Case(files, tmp_path, "loss.image_token_weight=1.0").loss()[1]
    assert with_token.item() != pytest.approx(loss.item(), rel=1e-3)


def test_dropped_face_is_the_encoding_of_a_crop_of_zeros(files, tmp_path):
    case = Case(files, tmp_path)
    encoder, adapter = case.models.encoder, case.models.adapter
    grey = encoder.encode(torch.full((1, 64, 64, 3), 0.5))  # zero under mean and deviation 0.5
    torch.testing.assert_close(adapter.null_hidden, grey)
    case.batch.drop_face = [True] * 6
    case.loss()[1].backward()
    assert adapter.projection.weight.grad.abs().max() > 0  # through the trained projection, as any face


def test_data_type_is_another_one_in_training_than_in_sampling(files, tmp_path, monkeypatch):
    from trainer.training.sampling import sample
    from trainer.training.validation import make_guidance

    seen: list[int] = []
    forward = UViT.forward

    def watched(self, *inputs, data_type=None, **options):
        seen.append(int(data_type.unique()))
        return forward(self, *inputs, data_type=data_type, **options)

    monkeypatch.setattr(UViT, "forward", watched)
    case = Case(files, tmp_path)
    case.loss()
    assert set(seen) == {0}
    seen.clear()
    base = case.models.frozen
    form = make_guidance(small(files, tmp_path).validation)
    sample(base, torch.randn(1, *base.latent_shape(64, 64)), base.null_text(), form, None, steps=2)
    assert set(seen) == {1}
    seen.clear()
    case.loss()
    assert set(seen) == {0}
    seen.clear()
    Case(files, tmp_path, "model.data_type=1").loss()
    assert set(seen) == {1}


def test_only_references_are_mirrored(files, tmp_path):
    config = small(files, tmp_path)
    records, _ = read_manifest(config.data.manifest)
    dataset = FaceDataset(records, config, TensorShapes((4, 8, 8)))
    draws = [dataset.draws(index, visit) for index in range(12) for visit in range(20)]
    assert not any(draw.flip or draw.drop_text for draw in draws)
    drawn = [(number // 20, draw.references[0]) for number, draw in enumerate(draws) if draw.references]
    assert all(reference.index == index and reference.variant is None for index, reference in drawn)
    assert 0.4 < sum(reference.flip for _, reference in drawn) / len(drawn) < 0.6


def test_run_with_a_cache(files, tmp_path):
    config = small(files, tmp_path / "run", f"data.cache={tmp_path / 'cache'}")
    assert make_cache(config, progress=False).computed == {"picture": 12, "text": 5, "face": 24}
    try:
        assert train.train(config) is True
    finally:
        torch.use_deterministic_algorithms(False)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert moved(weights(tmp_path / "run", 2), weights(tmp_path / "run", 4))
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in logged for value in line.values())
    assert export.main([str(tmp_path / "run"), "-o", str(tmp_path / "adapter.safetensors")]) in (0, None)
    found = load_adapter(tmp_path / "adapter.safetensors").config
    assert (found.host, found.tap, found.null) == ("unidiffuser", "output", "zero_crop")
    assert found.encoder.image_mean == (0.5, 0.5, 0.5) and found.encoder.crop_scale == 1.1
