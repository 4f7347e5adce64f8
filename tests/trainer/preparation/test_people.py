"""Who is in the photos that are prepared: by folder, by pattern, by their faces."""

from __future__ import annotations

import sys

import pytest
from PIL import Image, ImageDraw
from support.preparation import BOX, make_photo, rows_of, run, write_table

from feedface_core.faces import recognisers
from trainer import prepare as command


class ByColour:
    """A recogniser for discs: the mean colour of the box is the face, dark ones are not recognised."""

    name, distance = "colour", 0.3

    def __init__(self):
        self.seen = []

    def vector(self, image, face):
        self.seen.append(face)
        left, top, right, bottom = map(int, face.box)
        values = image[top:bottom, left:right].mean((0, 1))
        return values if values.max() > 0.3 else None


@pytest.fixture
def folders(tmp_path):
    """``ann`` holds one person and a stranger, ``00000`` three strangers; all with boxes in a table."""
    colours = {
        "ann/1.png": "red",
        "ann/2.png": "red",
        "ann/3.png": "red",
        "ann/4.png": "blue",
        "00000/1.png": "red",
        "00000/2.png": "lime",
        "00000/3.png": "blue",
        "single.png": "red",
    }
    rows = []
    for seed, (name, colour) in enumerate(colours.items()):
        path = make_photo(tmp_path / "photos" / name, seed)
        with Image.open(path) as file:
            photo = file.convert("RGB")
        ImageDraw.Draw(photo).rectangle((50, 30, 110, 85), fill=colour)
        photo.save(path)
        rows.append({"path": name, "bbox": BOX})
    return write_table(tmp_path / "photos/t.jsonl", rows)


def identities_of(output):
    return {row["id"]: row["identity"] for row in rows_of(output)}


def test_strangers_in_a_folder_are_no_person(folders, tmp_path, monkeypatch, capsys):
    recogniser = ByColour()
    monkeypatch.setattr(command, "load_recogniser", lambda *_: recogniser)
    loose = "filter.minimum_sharpness=0"
    summary = run(folders, tmp_path / "out", loose)
    people = identities_of(tmp_path / "out")
    assert {name for name, person in people.items() if person == "ann"} == {"ann/1.png", "ann/2.png", "ann/3.png"}
    assert [person for person in people.values() if person != "ann"] == [None] * 5
    assert summary["identities_from"] == {"none": 5, "folder": 3} and summary["identities"] == 1
    assert len(summary["notes"]) == 2 and "several people (00000)" in summary["notes"][0]
    assert len(recogniser.seen) == 7  # the one without a folder has nobody to be compared with
    assert run(folders, tmp_path / "out", loose) == summary and len(recogniser.seen) == 7
    recogniser.name = "another"  # whose vectors are not comparable
    run(folders, tmp_path / "out", loose)
    assert len(recogniser.seen) == 14
    assert command.main([str(folders), str(tmp_path / "out"), loose]) == 0
    assert "1 sub-folder(s) hold several people" in capsys.readouterr().out


def test_without_a_recogniser_folders_are_people_only_if_asked_for(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("feedface_core.faces.recognisers.find_insightface_packs", lambda _: [])
    monkeypatch.setitem(sys.modules, "dlib", None)
    recognisers._load_dlib.cache_clear()
    loose = "filter.minimum_sharpness=0"
    summary = run(folders, tmp_path / "out", loose)
    assert set(identities_of(tmp_path / "out").values()) == {None}
    assert "7 photos lie in 2 sub-folder(s), and nothing says whether each is one person" in summary["notes"][0]
    assert "no InsightFace models" in summary["notes"][0]
    run(folders, tmp_path / "out", loose, "identity.source=folder")
    assert set(identities_of(tmp_path / "out").values()) == {None, "ann", "00000"}
    wanted = "identity.recogniser=dlib"
    assert command.main([str(folders), str(tmp_path / "out"), wanted]) == 1
    assert "identity.source=auto needs a face recogniser" in capsys.readouterr().err


# --- photographs -----------------------------------------------------------------------------------------


def test_photos_of_several_people(shared_faces, tmp_path):
    pytest.importorskip("facenet_pytorch")
    names = [f"{person}_{number}.jpg" for person in (1433, 1540, 1558) for number in (1, 2)]
    for name in names:
        (tmp_path / name).write_bytes((shared_faces / name).read_bytes())
    summary = run(tmp_path, tmp_path / "out", r"identity.pattern=^(\d+)_", "detect.detector=mtcnn")
    assert summary["kept"] == 6 and summary["identities"] == 3 and summary["without_other_photo"] == 0
    assert [row["identity"] for row in rows_of(tmp_path / "out")] == [name[:4] for name in names]
    assert summary["near_duplicate_pairs"] == 0


def test_clustering_with_dlib(shared_faces, tmp_path):
    pytest.importorskip("dlib")
    pytest.importorskip("facenet_pytorch")
    names = ["1540_1.jpg", "1540_2.jpg", "1558_3.jpg", "1558_6.jpg", "1558_7.jpg"]
    for name in names:
        (tmp_path / name).write_bytes((shared_faces / name).read_bytes())
    settings = ("identity.source=cluster", "identity.recogniser=dlib", "detect.detector=mtcnn")
    summary = run(tmp_path, tmp_path / "out", *settings)
    people = {row["id"]: row["identity"] for row in rows_of(tmp_path / "out")}
    assert people == {name: "person-0001" if name.startswith("1558") else "person-0002" for name in names}
    assert summary["photos_per_identity"] == [2, 2.5, 3]
    assert "vector" not in (tmp_path / "out/manifest.jsonl").read_text()


def test_folders_of_photographs_are_compared(shared_faces, tmp_path):
    pytest.importorskip("dlib")
    pytest.importorskip("facenet_pytorch")
    folders = {"one": ("1558_3", "1558_6", "1558_7"), "many": ("1540_1", "1558_1", "1433_1")}
    for folder, names in folders.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.jpg").write_bytes((shared_faces / f"{name}.jpg").read_bytes())
    summary = run(tmp_path, tmp_path / "out", "identity.recogniser=dlib", "detect.detector=mtcnn")
    assert summary["kept"] == 6 and summary["identities"] == 1
    people = {row["id"]: row["identity"] for row in rows_of(tmp_path / "out")}
    assert {id_ for id_, person in people.items() if person == "one"} == {f"one/{name}.jpg" for name in folders["one"]}
    assert "several people (many)" in summary["notes"][0]
