"""Loading adapters, encoding and keeping faces, and the folders they live in."""

from __future__ import annotations

import re

import pytest
import torch


@pytest.fixture
def folder_lists(comfy, monkeypatch, tmp_path):
    """ComfyUI's table of folders, to be changed at will."""
    import folder_paths

    table = {
        name: (list(paths), set(extensions))
        for name, (paths, extensions) in folder_paths.folder_names_and_paths.items()
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    folder_paths.filename_list_cache.clear()
    yield table
    folder_paths.filename_list_cache.clear()


def test_folders_of_extra_model_paths_come_in(pack, folder_lists, tmp_path, monkeypatch):
    """ComfyUI enters the paths of extra_model_paths.yaml before it loads packs, without extensions."""
    monkeypatch.setattr(pack.folders, "OWN_ADAPTERS", tmp_path / "absent")
    extra = tmp_path / "shared disk" / "feedface"
    for file in ("a.safetensors", "notes.txt", "faces/ann.safetensors"):
        (extra / file).parent.mkdir(parents=True, exist_ok=True)
        (extra / file).write_bytes(b"")
    folder_lists["feedface"] = ([str(extra)], set())
    folder_lists.pop("feedface_faces")
    pack.folders.register()
    assert folder_lists["feedface"][0] == [str(extra), str(tmp_path / "models" / "feedface")]
    assert pack.folders.choices("feedface") == ["a.safetensors"]
    assert pack.folders.choices("feedface_faces") == ["ann.safetensors"]
    assert pack.folders.find("feedface", "a.safetensors") == str(extra / "a.safetensors")
    assert pack.folders.face_path("people/bob") == (extra / "faces" / "people" / "bob.safetensors").resolve()
    assert not (tmp_path / "models").exists()  # nothing is created at import


def options_of(node, name: str) -> list[str]:
    """What the frontend offers for an input; it shows an empty list as "undefined"."""
    (found,) = [one for one in node.define_schema().inputs if one.id == name]
    return found.options


def test_an_empty_list_says_which_folder_is_empty(pack, folder_lists, tmp_path, monkeypatch):
    monkeypatch.setattr(pack.folders, "OWN_ADAPTERS", tmp_path / "absent")
    for name in ("feedface", "feedface_faces"):
        folder_lists.pop(name)
    pack.folders.register()
    for node, name, folder in (
        (pack.loaders.LoadAdapter, "adapter_name", "models/feedface"),
        (pack.face.LoadFace, "face_name", "models/feedface/faces"),
    ):
        (shown,) = options_of(node, name)
        assert shown == f"nothing in {folder}"
        assert re.search(rf"FeedFace: nothing to choose from; looked in .*{folder}", node.validate_inputs(shown))
    face = tmp_path / "models/feedface/faces/ann.safetensors"
    face.parent.mkdir(parents=True)
    face.touch()
    assert options_of(pack.face.LoadFace, "face_name") == ["ann.safetensors"]


def test_the_adapter_that_comes_with_the_pack_is_listed_last(pack, folder_lists, tmp_path, monkeypatch):
    own = tmp_path / "pack" / "adapter"
    for file in (own / "feedface_small.safetensors", tmp_path / "models" / "feedface" / "mine.safetensors"):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
    monkeypatch.setattr(pack.folders, "OWN_ADAPTERS", own)
    for name in ("feedface", "feedface_faces"):
        folder_lists.pop(name)
    pack.folders.register()
    assert folder_lists["feedface"][0] == [str(tmp_path / "models" / "feedface"), str(own)]
    assert set(pack.folders.choices("feedface")) == {"feedface_small.safetensors", "mine.safetensors"}
    # faces are saved among the user's models, never inside the pack
    assert folder_lists["feedface_faces"][0] == [str(tmp_path / "models" / "feedface" / "faces")]


def test_adapter_info_shows_what_the_file_says(pack, adapter):
    shown = pack.loaders.AdapterInfo.execute(adapter)
    text = shown.args[0]
    assert "sd_unet" in text and "7 of widths 32, 64" in text and "included" in text
    assert "strength 1.0, concat, at most 5 references" in text


def test_a_replaced_file_is_loaded_again(pack, folder_lists, make_adapter, tmp_path):
    import os

    path = tmp_path / "models" / "feedface" / "a.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(open(make_adapter().path, "rb").read())
    folder_lists["feedface"] = ([str(path.parent)], {".safetensors"})
    before = pack.loaders.LoadAdapter.fingerprint_inputs("a.safetensors")
    assert before == pack.loaders.LoadAdapter.fingerprint_inputs("a.safetensors")
    os.utime(path, (1, 1))
    assert before != pack.loaders.LoadAdapter.fingerprint_inputs("a.safetensors")


@pytest.mark.parametrize("choice", ["auto", "vit.safetensors"])
def test_a_replaced_encoder_is_loaded_again(pack, folder_lists, tmp_path, choice):
    """Whether it was chosen or found, and by its contents' size when the clock says nothing."""
    import os

    for folder in ("feedface", "clip_vision"):
        (tmp_path / folder).mkdir()
        folder_lists[folder] = ([str(tmp_path / folder)], {".safetensors"})
    (tmp_path / "feedface" / "a.safetensors").write_bytes(b"adapter")
    encoder = tmp_path / "clip_vision" / "vit.safetensors"
    encoder.write_bytes(b"one")
    os.utime(encoder, (1, 1))
    before = pack.loaders.LoadAdapter.fingerprint_inputs("a.safetensors", choice)
    encoder.write_bytes(b"another")
    os.utime(encoder, (1, 1))
    assert pack.loaders.LoadAdapter.fingerprint_inputs("a.safetensors", choice) != before


def test_only_the_first_references_are_used(pack, adapter, crops):
    encode = pack.face.EncodeFaces.execute
    face = encode(adapter, crops, weights="1, 2, 3", max_references=2).args[0]
    assert face.hidden.shape == (2, 17, 48) and face.weights == (1.0, 2.0)
    assert torch.equal(face.hidden, encode(adapter, crops[:2]).args[0].hidden)


def test_encoding_is_the_encoder_on_the_crops(pack, adapter, crops):
    file = pack.format.load_adapter(adapter.path)
    encoder = pack.encoder.build_encoder(file.config.encoder, file.encoder_tensors)
    expected = pack.encoder.encode(encoder, file.config.encoder, crops)
    assert torch.equal(pack.face.EncodeFaces.execute(adapter, crops).args[0].hidden, expected)


def combine(pack, face):
    return pack.conditioning.combine_references(face.hidden, [len(face.hidden)], face.combination, face.weights)[0]


def test_combining_in_the_average_follows_the_share(pack, face, other_face):
    for share in (0.1, 0.9):
        blend = pack.face.CombineFaces.execute(face, other_face, share, "average").args[0]
        torch.testing.assert_close(combine(pack, blend)[0], (1 - share) * face.hidden[0] + share * other_face.hidden[0])


def test_a_blend_of_two_faces(pack, face, other_face):
    blend = pack.face.CombineFaces.execute(face, other_face, 0.25, "weighted_average").args[0]
    combined = combine(pack, blend)
    torch.testing.assert_close(combined[0], 0.75 * face.hidden[0] + 0.25 * other_face.hidden[0])
    alone = pack.face.CombineFaces.execute(face, other_face, 0.0, "concat").args[0]
    assert torch.equal(combine(pack, alone), combine(pack, face))


def test_faces_of_adapters_with_one_encoder_are_interchangeable(pack, adapter, face, tmp_path):
    """The same adapter in half precision has the same encoder as far as faces are concerned."""
    file = pack.format.load_adapter(adapter.path)
    path = pack.format.save_adapter(
        tmp_path / "half.safetensors", file.config, file.tensors, file.encoder_tensors, dtype=torch.float16
    )
    pack.adapter.LoadedAdapter(str(path)).check_face(face)
