"""Photos with several people: one row with all their faces, each with its crop, and one mask for all."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from support.preparation import BOX, dropped_of, make_photo, rows_of, run, write_table

from trainer import prepare as command
from trainer.data.manifest import read_manifest

OTHER = [5, 60, 45, 100]
LOOSE = ("filter.minimum_sharpness=0", "filter.minimum_face=20", "mask.parser=ellipse")


@pytest.fixture
def table(tmp_path):
    rows = []
    for seed, name in enumerate(("pair.png", "alone.png", "other.png")):
        make_photo(tmp_path / name, seed)
        rows.append({"path": name, "bbox": BOX, "identity": "ann", "caption": "someone"})
    rows[0] |= {"faces": [{"bbox": OTHER, "identity": "ben"}], "caption": "two people"}
    rows[2]["identity"] = "ben"
    return write_table(tmp_path / "table.jsonl", rows)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_row_has_all_faces_and_trains_as_one_sample_each(table, tmp_path, form):
    summary = run(table, tmp_path / "out", "filter.people=2", f"manifest={form}", *LOOSE)
    assert (summary["kept"], summary["further_faces"], summary["identities"]) == (3, 1, 2)
    assert summary["without_other_photo"] == 0
    records, _ = read_manifest(tmp_path / f"out/manifest.{form}")
    assert [(one.identity, one.face_number, one.face_count) for one in records] == [
        ("ann", 0, 2), ("ben", 1, 2), ("ann", 0, 1), ("ben", 0, 1),
    ]  # fmt: skip
    assert records[1].bbox == tuple(OTHER) and records[1].crop_path.is_file() and records[1].crop_hash is not None
    assert records[1].crop_path != records[0].crop_path and records[1].mask_path == records[0].mask_path
    with Image.open(records[0].mask_path) as mask:
        assert mask.getpixel((80, 60)) == mask.getpixel((25, 80)) == 255 and mask.getpixel((140, 110)) == 0


def test_without_being_asked_for_they_are_left_out(table, tmp_path):
    run(table, tmp_path / "out", *LOOSE)
    assert dropped_of(tmp_path / "out") == {"pair.png": "several faces"}
    assert all("faces" not in row for row in rows_of(tmp_path / "out"))


def test_a_second_run_does_nothing_unless_a_crop_is_gone(table, tmp_path, monkeypatch):
    settings = (table, tmp_path / "out", "filter.people=2", *LOOSE)
    summary, worked = run(*settings), []
    process = command.FindFace.process
    monkeypatch.setattr(
        command.FindFace, "process", lambda self, photo: worked.append(photo.id) or process(self, photo)
    )
    assert run(*settings) == summary and worked == []
    (tmp_path / "out" / rows_of(tmp_path / "out")[0]["faces"][0]["crop_path"]).unlink()
    assert run(*settings) == summary and worked == ["pair.png"]


class Recogniser:
    """Tells faces by the place of their box."""

    name, distance = "place", 0.5

    def vectors(self, image, faces):
        return [torch.tensor([float(face.box[0] > 20), 0.0]) for face in faces]

    def vector(self, image, face):
        return self.vectors(image, [face])[0]


def test_clustering_names_all_faces(table, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_recogniser", lambda *_: Recogniser())
    run(table, tmp_path / "out", "filter.people=2", "identity.source=cluster", *LOOSE)
    rows = rows_of(tmp_path / "out")
    assert [row["identity"] for row in rows] == ["person-0001"] * 3
    assert rows[0]["faces"][0]["identity"] == "person-0002"
    assert "vector" not in (tmp_path / "out/manifest.jsonl").read_text()


def test_one_face_too_many_or_too_small_is_said(table, tmp_path):
    run(table, tmp_path / "out", "filter.people=2", LOOSE[0], LOOSE[2], "filter.minimum_face=50")
    assert dropped_of(tmp_path / "out") == {"pair.png": "small face"}
