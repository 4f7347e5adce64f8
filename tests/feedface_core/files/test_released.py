"""Reading the files of the published releases, and the errors for those that are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from feedface_core.errors import FeedFaceError
from feedface_core.files import convert, released
from feedface_core.files.adapter_file import load_adapter
from feedface_core.modules.encoder import build_encoder
from feedface_core.state_dict import read_state_dict

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden"


class Gadget:
    """What a malicious pickle would hold."""

    def __reduce__(self):
        return (print, ("code from a file was run",))


def test_released_adapter_describes_itself():
    config = load_adapter(GOLDEN / "feed.pt").config
    assert (config.host, config.tap, config.null, config.combination) == ("unidiffuser", "output", "off", "concat")
    assert (config.strength, config.max_references) == (0.8, 5)
    assert config.encoder.image_mean == config.encoder.image_std == (0.5, 0.5, 0.5)
    assert (config.encoder.layer, config.encoder.tokens, config.encoder.included) == (-2, 50, True)
    assert [site.name for site in config.sites] == ["in_blocks.0", "out_blocks.0"]


def published(prefix: str = "vision_model.") -> dict[str, torch.Tensor]:
    """Keys and shapes of feed-4800000.pt without its storage."""

    def empty(*shape):
        return torch.empty(shape, device="meta")

    state = {"preprocess_module.project_layer.weight": empty(1536, 768)}
    vision = f"preprocess_module.clip_model.{prefix}"
    state |= {
        f"{vision}embeddings.patch_embedding.weight": empty(768, 3, 32, 32),
        f"{vision}embeddings.position_embedding.weight": empty(50, 768),
        f"{vision}embeddings.class_embedding": torch.zeros(768),
        f"{vision}post_layernorm.weight": torch.ones(768),
    }
    state |= {f"{vision}encoder.layers.{i}.mlp.fc1.weight": empty(3072, 768) for i in range(12)}
    state |= {f"blocks.{i}.zero_linear.weight": empty(1536, 1536) for i in range(14)}
    return state


def test_published_sizes():
    """Everything the weights do not tell is known for the published adapter: no file beside it is needed."""
    config, tensors, encoder = released.read_adapter(published())
    names = [f"{side}.{i}" for side in ("in_blocks", "out_blocks") for i in (0, 2, 4, 6, 8, 10, 12)]
    assert [site.name for site in config.sites] == names
    assert {(site.width, site.heads, site.head_dim) for site in config.sites} == {(1536, 64, 24)}
    assert config.encoder.config == {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    assert "branches.13.zero_linear.weight" in tensors and "projection.weight" in tensors
    assert "encoder.layers.11.mlp.fc1.weight" in encoder
    # The U-ViT's 24 heads, from a config that lies beside both files, are not the branches'.
    assert released.read_adapter(published(), {"heads": 24})[0].sites[0].heads == 64
    assert released.read_adapter(published(""))[0] == config


def test_encoder_weights_with_and_without_their_prefix(tmp_path):
    state = torch.load(GOLDEN / "feed.pt", weights_only=True)
    prefixed = {key.replace("clip_model.", "clip_model.vision_model."): tensor for key, tensor in state.items()}
    # A buffer that older versions of transformers put into files.
    prefixed["preprocess_module.clip_model.vision_model.embeddings.position_ids"] = torch.arange(50).unsqueeze(0)
    torch.save(prefixed, tmp_path / "feed.pt")
    shutil.copy(GOLDEN / "config.json", tmp_path)
    ours, theirs = load_adapter(tmp_path / "feed.pt"), load_adapter(GOLDEN / "feed.pt")
    assert ours.config == theirs.config and ours.config.encoder.fingerprint
    assert all(torch.equal(tensor, ours.encoder_tensors[key]) for key, tensor in theirs.encoder_tensors.items())
    build_encoder(ours.config.encoder, ours.encoder_tensors)
    assert convert.plan(tmp_path / "feed.pt").tensors.keys() == convert.plan(GOLDEN / "feed.pt").tensors.keys()


def test_code_in_a_file_is_never_run(tmp_path, capsys):
    path = tmp_path / "feed.pt"
    torch.save({"blocks": Gadget()}, path)
    with pytest.raises(FeedFaceError, match=r"feed\.pt is not a readable weights file"):
        read_state_dict(path)
    with pytest.raises(FeedFaceError, match=r"feed\.pt"):
        load_adapter(path)
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["uvit.pth", "caption_decoder.pth"])
def test_the_wrong_released_file(tmp_path, name):
    shutil.copy(GOLDEN / name, tmp_path / "feed.pt")
    what = {"uvit.pth": "U-ViT .*diffusion_models", "caption_decoder.pth": "caption decoder .*text_encoders"}[name]
    with pytest.raises(FeedFaceError, match=rf"feed\.pt: .*this is UniDiffuser's {what}"):
        load_adapter(tmp_path / "feed.pt")


def test_truncated_files(tmp_path):
    for name in ("uvit.pth", "golden.safetensors"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes()[:-5000])
        with pytest.raises(FeedFaceError, match=rf"{name} .*truncated"):
            read_state_dict(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.pth"):
        read_state_dict(tmp_path / "absent.pth")


def test_other_pickles(tmp_path):
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(FeedFaceError, match="expected a state dict of tensors, found Tensor"):
        read_state_dict(tmp_path / "tensor.pt")
    torch.save({"weight": torch.zeros(2), "epoch": 3}, tmp_path / "training.pt")
    with pytest.raises(FeedFaceError, match="but epoch is of another kind"):
        read_state_dict(tmp_path / "training.pt")


def test_wrappers_of_state_dicts(tmp_path):
    state = torch.load(GOLDEN / "uvit.pth", weights_only=True)
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / "uvit.pth")
    assert read_state_dict(tmp_path / "uvit.pth")[0].keys() == state.keys()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(tmp_path / "old.pth")[0]["pos_embed"], state["pos_embed"])


def test_settings(tmp_path):
    weights = {"pos_embed": torch.zeros(1, 337, 48)}

    def settings(metadata=None):
        return released.settings_for(tmp_path / "uvit.pth", weights, metadata)

    assert settings() == {}
    (tmp_path / "config.json").write_text('{"heads": 3, "embed": 48}')
    assert settings() == {"heads": 3}
    (tmp_path / "uvit.json").write_text('{"heads": 2}')
    assert settings() == {"heads": 2}
    assert settings({"unidiffuser": '{"heads": 4}'}) == {"heads": 4}
    (tmp_path / "uvit.json").write_text("[2]")
    with pytest.raises(ValueError, match=r"uvit\.json: expected an object, found \[2\]"):
        settings()


@pytest.mark.parametrize("text", ['{"heads": 3}', '{"heads": 3, "embed": 64}', "[3]", "not JSON", '{"embed": {}}'])
def test_a_config_of_something_else_beside_the_file_is_not_believed(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert released.settings_for(tmp_path / "uvit.pth", {"pos_embed": torch.zeros(1, 337, 48)}) == {}


def test_incomplete_adapters():
    def without(*starts):
        return {key: t for key, t in published().items() if not key.startswith(starts)}

    with pytest.raises(ValueError, match="none of its blocks"):
        released.read_adapter(without("blocks."))
    with pytest.raises(ValueError, match="13 branches do not split evenly"):
        released.read_adapter(without("blocks.13."))
    with pytest.raises(ValueError, match="lacks embeddings.patch_embedding.weight"):
        released.read_adapter(without("preprocess_module.clip_model."))
    state = torch.load(GOLDEN / "feed.pt", weights_only=True)
    with pytest.raises(ValueError, match='give it as {"branch_heads": N}'):
        released.read_adapter(state)
    with pytest.raises(ValueError, match='{"vision": {"num_attention_heads": N}}'):
        released.read_adapter(state, {"branch_heads": 2})
    settings = json.loads((GOLDEN / "config.json").read_text())
    with pytest.raises(ValueError, match="2 branches in the file, but 1 sites"):
        released.read_adapter(state, {**settings, "sites": ["in_blocks.0"]})


def test_prefix():
    prefix = released.read_prefix(GOLDEN / "caption_decoder.pth")
    assert {key: tuple(t.shape) for key, t in prefix.items()} == {
        "encode_prefix.weight": (64, 768),
        "encode_prefix.bias": (64,),
    }
    with pytest.raises(ValueError, match=r"uvit\.pth: this is UniDiffuser's U-ViT"):
        released.read_prefix(GOLDEN / "uvit.pth")
