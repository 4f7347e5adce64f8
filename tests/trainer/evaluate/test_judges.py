"""CLIP and ImageReward as judges."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from support.evaluation import make_small
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from examples.small_model.text import write_clip_tokenizer
from feedface_core.config import CLIP_MEAN, CLIP_STD
from tools.tiny_diffusers import MERGES
from trainer.errors import TrainerError
from trainer.evaluate.__main__ import evaluate
from trainer.evaluate.judges import ClipJudge, RewardJudge


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = write_clip_tokenizer(folder, MERGES, 77)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(**sizes, **ends, vocab_size=len(tokenizer), max_position_embeddings=77)
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_similarity_is_that_of_transformers(clip):
    judge, image = ClipJudge(str(clip)), torch.rand(32, 32, 3)
    prompts = ["a person", "in the rain, a photo " * 40]
    tokens = judge.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    pixels = (image - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    model = CLIPModel.from_pretrained(clip)
    expected = model(**tokens, pixel_values=pixels.movedim(-1, 0)[None]).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(judge.images([image]) @ judge.texts(prompts).T, expected, rtol=1e-4, atol=1e-5)


def test_pictures_of_any_shape(clip):
    judge, wide = ClipJudge(str(clip)), torch.zeros(40, 100, 3)
    wide[:, 30:70] = torch.rand(40, 40, 3)
    middle = judge.images([wide[:, 30:70], torch.rand(7, 300, 3)])
    assert middle.shape == (2, 16)
    torch.testing.assert_close(judge.images([wide])[0], middle[0], rtol=0.05, atol=0.05)


def test_evaluation_with_both_judges(clip, tmp_path, monkeypatch):
    """Normalised text is 1 for the unmodified model: its own pictures are the upper end."""
    small = make_small(tmp_path / "small")
    rewards = tmp_path / "reward"
    rewards.mkdir()
    for name in ("ImageReward.pt", "med_config.json"):
        (rewards / name).write_text("{}")
    asked = []

    def score(prompt, path):
        asked.append((prompt, path))
        return 1.0 if "pictures" in path else 0.5 if "unmodified" in path else -0.5

    loaded = SimpleNamespace(load=lambda path, device, med_config: SimpleNamespace(score=score))
    monkeypatch.setitem(sys.modules, "ImageReward", loaded)
    settings = small.settings(tmp_path / "out", f"clip={clip}", f"image_reward={rewards}", "unmodified=1")
    rows = evaluate(settings)["rows"]
    assert rows["unmodified"]["clip_text_normalised"]["value"] == pytest.approx(1.0)
    assert rows["face"]["reward"]["value"] == 1.0 and rows["photos"]["reward"]["value"] == -0.5
    assert rows["face"]["reward_normalised"]["value"] == pytest.approx(1.5)
    assert -1.0 <= rows["face"]["clip_face"]["value"] <= 1.0
    assert rows["photos"]["clip_face"]["value"] is not None
    count = len(asked)
    evaluate(settings)
    assert len(asked) == count, "each picture is judged once for a prompt"


def test_refused(clip, tmp_path, monkeypatch):
    with pytest.raises(TrainerError, match=r"clip .*no config.json"):
        ClipJudge(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TrainerError, match="clip: cannot load"):
        ClipJudge(str(tmp_path))
    with pytest.raises(TrainerError, match=r"has no ImageReward.pt and no med_config.json"):
        RewardJudge(str(tmp_path))
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(TrainerError, match="pip install image-reward"):
        RewardJudge(str(tmp_path))
