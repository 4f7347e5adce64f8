"""JSON Lines whose text holds everything that Unicode calls a line boundary."""

from __future__ import annotations

import json

import pytest

from trainer.data.jsonl import keep_lines, read_lines
from trainer.data.manifest import read_rows, write_rows
from trainer.preparation.journal import Journal
from trainer.preparation.photo import Photo

BOUNDARIES = "\u2028 \u2029 \u0085 \v \f \x1c \x1d \x1e"
CAPTION = f"first{BOUNDARIES}last"


@pytest.mark.parametrize("name", ["manifest.jsonl", "manifest.parquet"])
def test_captions_with_any_line_boundary_come_back(tmp_path, name):
    rows = [{"path": "a.png", "caption": CAPTION}, {"path": "b.png", "caption": "plain"}]
    write_rows(tmp_path / name, rows)
    assert read_rows(tmp_path / name) == rows


def test_lines_of_other_systems_and_empty_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"path": 1}\r\n\r\n  \n{"path": 2}')
    assert list(read_lines(path)) == [(1, '{"path": 1}'), (4, '{"path": 2}')]


def test_journal_restores_a_caption_with_any_line_boundary(tmp_path):
    picture = tmp_path / "a.png"
    picture.touch()
    row = {"bbox": [1, 2, 3, 4], "square_bbox": [1, 2, 3, 4], "width": 8, "height": 8, "mask_kind": "given"}
    row |= {"detector": "given", "confidence": 1.0, "mask_area": 0.5, "photo_hash": "0" * 16, "crop_hash": "0" * 16}
    row |= {"caption": CAPTION} | {f"{kind}_path": f"{kind}s/00/{'0' * 32}.png" for kind in ("mask", "crop")}
    for kind in ("mask", "crop"):
        (tmp_path / row[f"{kind}_path"]).parent.mkdir(parents=True)
        (tmp_path / row[f"{kind}_path"]).touch()
    journal = Journal(tmp_path, "settings")
    journal.add(Photo("a", picture, row=row))
    again, photo = Journal(tmp_path, "settings"), Photo("a", picture)
    assert again.restore(photo, False, "no") and photo.row["caption"] == CAPTION


@pytest.mark.parametrize("cut", range(1, 12))
def test_line_that_was_cut_off_is_cut_off_for_good(tmp_path, cut):
    """Also where only its line feed is missing: the next line would be appended to it."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n'[:-cut])
    found = keep_lines(path, lambda _: True)
    with open(path, "a") as file:
        file.write('{"step": 3}\n')
    steps = [json.loads(line)["step"] for _, line in read_lines(path)]
    assert steps == [*(value["step"] for value in found), 3] and steps[0] == 1
