"""Where photos come from."""

from __future__ import annotations

import pytest
from PIL import Image

from trainer.errors import TrainerError
from trainer.preparation.inputs import find_photos


def test_folders_globs_and_caption_files(tmp_path):
    for name in ("ann/1.png", "ann/2.JPG", "bob/1.png", ".hidden.png", "out/crops/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "ann/1.txt").write_text("\ufeff写真,\n two lines ", encoding="utf-8")
    (tmp_path / "notes.md").touch()
    photos, root = find_photos(str(tmp_path), tmp_path / "out")
    assert root == tmp_path and [photo.id for photo in photos] == ["ann/1.png", "ann/2.JPG", "bob/1.png"]
    assert photos[0].given == {"caption": "写真, two lines"} and photos[1].given == {}
    photos, root = find_photos(str(tmp_path / "*/1.png"))
    assert [photo.id for photo in photos] == ["ann/1.png", "bob/1.png"]
    photos, root = find_photos(str(tmp_path / "ann/*.png"))
    assert root == tmp_path / "ann" and [photo.id for photo in photos] == ["1.png"]
    (tmp_path / "ann/1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrainerError, match="1.txt: the caption is not UTF-8"):
        find_photos(str(tmp_path))


def test_output_beside_the_photos_is_not_taken_for_photos(tmp_path):
    for name in ("1.png", "crops/1-abc.png", "masks/1-abc.png", "contact_sheet.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [photo.id for photo in find_photos(str(tmp_path), tmp_path)[0]] == ["1.png"]
