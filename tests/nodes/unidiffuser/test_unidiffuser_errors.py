"""Wrong files, wrong folders, wrong models: every error names what, where, and what to do."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import pytest
import torch
from support.unidiffuser import GOLDEN, sample


def test_unidiffuser_adapter_on_stable_diffusion(uni, adapter):
    from support.small_model import build_model

    with pytest.raises(ValueError, match=r"feed\.pt was made for UniDiffuser.* but this model is a U-Net"):
        uni.apply.ApplyFeedFace.execute(build_model(), adapter, 1.0, 0.0, 1.0)


def test_stable_diffusion_adapter_on_unidiffuser(uni, model, make_adapter):
    with pytest.raises(ValueError, match=r"a U-Net with.* but this model is UniDiffuser"):
        uni.apply.ApplyFeedFace.execute(model, make_adapter(), 1.0, 0.0, 1.0)


def changed(folder: Path, **changes) -> Path:
    state = torch.load(GOLDEN / "uvit.pth", weights_only=True)
    for key, value in changes.items():
        key = key.replace("__", ".")
        state.pop(key) if value is None else state.update({key: value})
    torch.save(state, folder / "uvit.pth")
    shutil.copy(GOLDEN / "config.json", folder / "uvit.json")
    return folder / "uvit.pth"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed_token": None, "token_embedding__weight": None}, "this is UniDiffuser v0"),
        ({"clip_img_embed__weight": None}, "but not UniDiffuser's"),
        ({"out_blocks__0__skip_linear__weight": None}, "1 missing: out_blocks.0.skip_linear.weight"),
        ({"in_blocks__0__norm3__weight": None}, "pre-norm"),
        ({"norm__weight": None}, "1 missing: norm.weight"),
        ({"surplus": torch.zeros(1)}, "1 surplus: surplus"),
        ({"decoder_pred__weight": torch.zeros(2, 2)}, r"decoder_pred.weight is \(2, 2\), expected \(16, 48\)"),
    ],
    ids=["v0", "no text", "no skip", "pre-norm", "missing", "surplus", "shape"],
)
def test_other_variants_are_refused(uni, tmp_path, changes, message):
    path = changed(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"uvit\.pth: .*{message}"):
        uni.model.load_unidiffuser(path, GOLDEN / "caption_decoder.pth")


def test_unknown_heads(uni, tmp_path):
    path = changed(tmp_path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"width 48: the number of attention heads .* \{\"heads\": N\}"):
        uni.model.load_unidiffuser(path, GOLDEN / "caption_decoder.pth")


def test_files_mixed_up(uni):
    with pytest.raises(ValueError, match=r"caption_decoder\.pth: this is UniDiffuser's caption decoder"):
        uni.model.load_unidiffuser(GOLDEN / "caption_decoder.pth", GOLDEN / "uvit.pth")
    with pytest.raises(ValueError, match=r"feed\.pth?: this is the released FeedFace adapter \(models/feedface\)"):
        uni.model.load_unidiffuser(GOLDEN / "uvit.pth", GOLDEN / "feed.pt")


@pytest.fixture
def model_folders(comfy, tmp_path, monkeypatch) -> Path:
    """Empty model folders for the node's search."""
    import folder_paths

    for kind in ("diffusion_models", "text_encoders", "checkpoints"):
        (tmp_path / kind).mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def test_files_are_found_and_misplaced_ones_named(comfy, uni, model_folders):
    import folder_paths

    node, models, texts = uni.nodes.LoadUniDiffuser, model_folders / "diffusion_models", model_folders / "text_encoders"
    missing = comfy.module("feedface_core.errors").MissingFile
    (empty,) = node.define_schema().inputs[0].options
    assert empty == "nothing in models/diffusion_models"
    assert "nothing to choose from (UniDiffuser's U-ViT" in node.validate_inputs(empty)
    answer = node.validate_inputs("uvit_v1.pth")
    assert "no file 'uvit_v1.pth'" in answer and str(models) in answer
    shutil.copy(GOLDEN / "uvit.pth", model_folders / "checkpoints" / "uvit_v1.pth")
    answer = node.validate_inputs("uvit_v1.pth")
    assert f"It lies in {model_folders / 'checkpoints'}: move it to {models}" in answer
    shutil.move(model_folders / "checkpoints" / "uvit_v1.pth", models)
    shutil.copy(GOLDEN / "config.json", models / "uvit_v1.json")
    folder_paths.filename_list_cache.clear()
    assert node.validate_inputs("uvit_v1.pth") is True
    message = r"FeedFace Load UniDiffuser: no file 'caption_decoder.pth' \(caption_decoder; or beside uvit_v1.pth\).*"
    with pytest.raises(missing, match=message + str(texts)):
        node.execute("uvit_v1.pth")
    (texts / "sub").mkdir()
    shutil.copy(GOLDEN / "caption_decoder.pth", texts / "sub")
    folder_paths.filename_list_cache.clear()
    model = node.execute("uvit_v1.pth", weight_dtype="fp32").args[0]
    assert model.model.diffusion_model.encode_prefix.weight.shape == (64, 768)
    shutil.copy(GOLDEN / "caption_decoder.pth", models)
    folder_paths.filename_list_cache.clear()
    assert uni.nodes.find_prefix(models / "uvit_v1.pth", "auto") == models / "caption_decoder.pth"  # beside it first


def test_a_missing_file_is_reported_once(uni):
    """ComfyUI repeats what ``validate_inputs`` answers for each input that it takes."""
    assert list(inspect.signature(uni.nodes.LoadUniDiffuser.validate_inputs).parameters) == ["uvit"]


def test_text_of_another_clip(model, prompts):
    wide = [[torch.zeros(1, 77, 2048), {}]]
    with pytest.raises(ValueError, match=r"\(B, 77, 768\).*has \(1, 77, 2048\)"):
        sample(model, wide, prompts[1])


def test_long_prompt_is_cut_with_a_warning(model, prompts, golden, caplog):
    long = [[torch.cat([golden["in.text_states"][:1], golden["in.text_states"][1:]], dim=1), {}]]
    assert torch.equal(sample(model, long, prompts[1]), sample(model, *prompts))
    assert "reads 77 tokens of a prompt; 77 more are left out" in caplog.text


def test_model_called_without_its_token(model):
    with pytest.raises(ValueError, match="outside of a sampling run"):
        model.model.apply_model(
            torch.zeros(1, 4, 16, 16), torch.ones(1), c_crossattn=torch.zeros(1, 77, 64), text_time=torch.zeros(1)
        )


def test_controlnet_is_refused(model):
    with pytest.raises(ValueError, match="ControlNet is connected to UniDiffuser"):
        model.model.apply_model(torch.zeros(1, 4, 16, 16), torch.ones(1), control={"output": []})
