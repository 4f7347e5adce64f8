"""Bad input, one row each: an error before sampling that names the node, what was found and what was expected.

What the detector and the adapter files refuse in detail is tested beside them; this is what a user of the graph meets.
"""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from support.small_model import NEGATIVE, POSITIVE, apply, build_model, prompt, sample


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a file ran')",))


def load(pack, name):
    return pack.loaders.LoadAdapter.execute(name).args[0]


def detect(comfy, image, **options):
    node = comfy.module("nodes.detect").DetectFaces
    defaults = {"detector": "whole image", "order": "size", "indexes": "0", "min_size": 20, "when_none": "error"}
    return node.execute(image, **{**defaults, **options})


# Adapter files.


@pytest.mark.parametrize(
    "name, contents, message",
    [
        ("short.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "truncated or of another kind"),
        ("notes.safetensors", b"just some text, no weights", "truncated or of another kind"),
        ("code.pt", pickle.dumps(Bomb()), "holds code, which is never run"),
        ("old.pth", b"PK\x03\x04 broken", "truncated, not a PyTorch file, or holds code"),
    ],
)
def test_adapter_file_that_is_none(pack, model_folder, name, contents, message):
    (model_folder / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message) as caught:
        load(pack, name)
    assert str(model_folder / name) in str(caught.value)


def test_adapter_file_of_another_kind(pack, model_folder):
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, str(model_folder / "style.safetensors"))
    with pytest.raises(ValueError, match="style.safetensors: not a FeedFace adapter.*this is a LoRA"):
        load(pack, "style.safetensors")


def test_adapter_that_is_not_there(pack, model_folder):
    with pytest.raises(FileNotFoundError, match="no file 'gone.safetensors'; looked in .*feedface"):
        load(pack, "gone.safetensors")


def test_face_encoder_that_is_not_there(pack, adapter):
    with pytest.raises(ValueError, match="^FeedFace Load Adapter: face_encoder is 'gone.safetensors'"):
        pack.loaders.LoadAdapter.execute(adapter.path, "gone.safetensors")


def test_adapter_without_its_encoder(pack, model_folder, adapter):
    found = pack.format.load_adapter(adapter.path)
    pack.format.save_adapter(model_folder / "bare.safetensors", found.config, found.tensors)
    message = (
        r"bare.safetensors needs the face encoder openai/clip-vit-base-patch32.*Looked for a file with "
        r"'clip-vit-base-patch32' in its name in .*clip; found no files"
    )
    with pytest.raises(ValueError, match=message):
        load(pack, "bare.safetensors")
    import folder_paths

    weights = {f"vision_model.{name}": tensor for name, tensor in found.encoder_tensors.items()}
    clip = model_folder.parents[1] / "clip"
    save_file(weights, str(clip / "face.safetensors"))
    folder_paths.filename_list_cache.clear()
    with pytest.raises(ValueError, match="found face.safetensors"):
        load(pack, "bare.safetensors")
    chosen = pack.loaders.LoadAdapter.execute("bare.safetensors", "face.safetensors").args[0]
    (clip / "face.safetensors").rename(clip / "CLIP-ViT-Base-Patch32.safetensors")  # by the name it has on the hub
    folder_paths.filename_list_cache.clear()
    found_by_name = load(pack, "bare.safetensors")
    crops = torch.rand(1, 32, 32, 3)
    assert torch.equal(chosen.encode(crops), adapter.encode(crops))
    assert torch.equal(found_by_name.encode(crops), adapter.encode(crops))


def test_adapter_with_a_wrong_encoder(pack, model_folder, adapter):
    found = pack.format.load_adapter(adapter.path)
    pack.format.save_adapter(model_folder / "bare.safetensors", found.config, found.tensors)
    wrong = {f"vision_model.{name}": tensor + 1 for name, tensor in found.encoder_tensors.items()}
    save_file(wrong, str(model_folder.parents[1] / "clip" / "other.safetensors"))
    with pytest.raises(ValueError, match="other.safetensors is encoder .*bare.safetensors was trained with"):
        pack.loaders.LoadAdapter.execute("bare.safetensors", "other.safetensors")


# Models.


def test_adapter_of_another_family(pack, adapter, face):
    wide = build_model(context_dim=768, model_channels=64)
    with pytest.raises(
        ValueError,
        match=r"adapter-1.*was made for a U-Net with Stable Diffusion's layout with 7 sites "
        r"of widths \[32, 64\], but this model is .* of widths \[64, 128\]",
    ):
        apply(pack, wide, adapter, face)


def test_model_of_an_unsupported_family(pack, model, adapter, face):
    unknown = model.clone()
    unknown.add_object_patch("diffusion_model", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear is not a model FeedFace can attach to; it knows Stable Diffusion 1.x"):
        apply(pack, unknown, adapter, face)


# Photos and crops.


@pytest.mark.parametrize(
    "image, options, message",
    [
        (torch.full((1, 64, 64, 3), float("nan")), {}, "NaN"),
        (torch.rand(1, 64, 64, 5), {}, "5 channels|64, 64, 5"),
        (torch.rand(0, 64, 64, 3), {}, r"shape \(0, 64, 64, 3\)"),
        (torch.rand(1, 5, 5, 3), {}, "largest has 5 pixels and min_size is 20"),
        (torch.rand(1, 64, 64, 3), {"indexes": "3"}, r"face 3 was asked for, but 1 face\(s\) were found"),
        (torch.rand(1, 64, 64, 3), {"indexes": "first"}, "first"),
        (torch.rand(1, 64, 64, 3), {"boxes": "[[1, 2"}, "JSON"),
        (torch.rand(1, 64, 64, 3), {"boxes": "[[10, 10, 15, 15]]"}, "largest has 5 pixels"),
        (torch.rand(1, 64, 64, 3), {"mask": torch.ones(1, 32, 48)}, "48"),
    ],
    ids=[
        "NaN",
        "five channels",
        "empty batch",
        "five pixels",
        "index",
        "index word",
        "broken boxes",
        "tiny box",
        "mask size",
    ],
)
def test_photos(comfy, image, options, message):
    with pytest.raises(ValueError, match=f"(?i)FeedFace Detect Faces.*({message})"):
        detect(comfy, image, **options)


def test_no_face_in_the_photo(comfy):
    pytest.importorskip("facenet_pytorch")
    grey = torch.full((1, 200, 200, 3), 0.5)
    with pytest.raises(ValueError, match="(?i)FeedFace Detect Faces.*no face"):
        detect(comfy, grey, detector="mtcnn")


def test_grey_and_transparent_photos_are_fine(comfy):
    for channels in (1, 4):
        crops = detect(comfy, torch.rand(1, 64, 64, channels)).args[0]
        assert crops.shape == (1, 224, 224, 3)


@pytest.mark.parametrize(
    "crops, message",
    [
        (None, "crops is None, expected images"),
        (torch.rand(0, 64, 64, 3), r"shape \(0, 64, 64, 3\)"),
        (torch.rand(64, 64, 3), r"shape \(64, 64, 3\)"),
        (torch.rand(1, 64, 64, 5), r"shape \(1, 64, 64, 5\), expected images"),
        (torch.full((1, 64, 64, 3), float("inf")), "values from inf to inf"),
        (torch.rand(1, 5, 5, 3), "5 × 5 pixels, too small"),
    ],
)
def test_crops(pack, adapter, crops, message):
    with pytest.raises(ValueError, match=f"FeedFace Encode Faces: .*{message}"):
        pack.face.EncodeFaces.execute(adapter, crops)


@pytest.mark.parametrize(
    "weights, message",
    [
        ("1_0", r"are not numbers"),
        ("\u0661", r"are not numbers"),
        ("1, 2", r"2 weights \('1, 2'\) for 1 crops"),
        ("heavy", "are not numbers of 0 to 1e\\+06 separated by commas"),
        ("-1", "weights '-1' are not numbers of 0 to"),
        ("nan", "weights 'nan' are not numbers of 0"),
    ],
)
def test_weights(pack, adapter, crops, weights, message):
    with pytest.raises(ValueError, match=message):
        pack.face.EncodeFaces.execute(adapter, crops[:1], weights=weights)


# Faces.


def test_face_of_another_encoder(pack, model, adapter, make_adapter, crops):
    other = make_adapter(seed=7)
    stranger = pack.face.EncodeFaces.execute(other, crops[:1]).args[0]
    with pytest.raises(
        ValueError,
        match=f"encoded by encoder {other.encoder_fingerprint}.*was trained with "
        f"{adapter.encoder_fingerprint}.*Encode the photos again",
    ):
        apply(pack, model, adapter, stranger)
    positive = pack.apply.SetFace.execute(prompt(POSITIVE), 1.0, stranger).args[0]
    with pytest.raises(ValueError, match="Encode the photos again"):
        sample(apply(pack, model, adapter), positive, prompt(NEGATIVE))


def test_faces_that_do_not_combine(pack, face, make_adapter, crops):
    stranger = pack.face.EncodeFaces.execute(make_adapter(seed=7), crops[:1]).args[0]
    with pytest.raises(ValueError, match="FeedFace Combine Faces: face_a comes from encoder"):
        pack.face.CombineFaces.execute(face, stranger, 0.5, "concat")


@pytest.mark.parametrize("name", ["", "../outside", "a/../../b", "/etc/passwd"])
def test_face_names_that_lead_elsewhere(pack, model_folder, face, name):
    with pytest.raises(ValueError, match="FeedFace Save Face: .* is not a usable file name"):
        pack.face.SaveFace.execute(face, name, False)


def test_a_saved_face_is_not_written_over(pack, model_folder, face, other_face):
    pack.face.SaveFace.execute(face, "ann", False)
    pack.face.SaveFace.execute(other_face, "ann", False)
    assert sorted(path.name for path in (model_folder / "faces").iterdir()) == ["ann.safetensors", "ann_2.safetensors"]
    first, second = (pack.face.LoadFace.execute(f"{name}.safetensors").args[0] for name in ("ann", "ann_2"))
    assert torch.equal(first.hidden, face.hidden) and torch.equal(second.hidden, other_face.hidden)
    assert pack.folders.choices("feedface") == ["nothing in models/feedface"]


def test_a_file_that_is_no_face(pack, model_folder, adapter):
    (model_folder / "faces" / "bad.safetensors").write_bytes(b"no face")
    with pytest.raises(ValueError, match="bad.safetensors: cannot be read as safetensors"):
        pack.face.LoadFace.execute("bad.safetensors")
    with pytest.raises(FileNotFoundError, match="no file 'nobody.safetensors'; looked in"):
        pack.face.LoadFace.execute("nobody.safetensors")


# Apply.


def test_start_after_end(pack, model, adapter, face):
    with pytest.raises(ValueError, match="FeedFace Apply Adapter: start 0.8 lies after end 0.2"):
        apply(pack, model, adapter, face, start=0.8, end=0.2)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(1, 16, 32), r"face mask is 32 × 16 pixels, but the picture being made has the shape 16 × 16"),
        (torch.ones(3, 16, 16), "3 face masks for a batch of 1 pictures"),
    ],
)
def test_masks_that_do_not_fit_the_picture(pack, model, adapter, face, mask, message):
    calls = []
    patched = apply(pack, model, adapter, face, mask=mask)
    with pytest.raises(ValueError, match=message):
        sample(patched, callback=lambda *args: calls.append(args))
    assert not calls  # before the first step


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.full((1, 16, 16), float("nan")), "FeedFace Apply Adapter: mask is .* holds NaN"),
        (torch.ones(1, 0, 16), "FeedFace Apply Adapter: mask is .* expected a mask"),
        (torch.ones(1, 1, 16, 16), "FeedFace Apply Adapter: mask is .* expected a mask"),
    ],
)
def test_masks_that_are_none(pack, model, adapter, face, mask, message):
    with pytest.raises(ValueError, match=message):
        apply(pack, model, adapter, face, mask=mask)
