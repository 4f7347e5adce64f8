"""From photos to a manifest: what is kept, why the rest is not, and going on where a run stopped."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.preparation import BOX, dropped_of, make_photo, rows_of, run, write_table

from feedface_core.faces import crop_face
from trainer import prepare as command
from trainer.data import pictures
from trainer.data.manifest import CropRule, read_manifest
from trainer.data.records import common_rule
from trainer.errors import TrainerError
from trainer.preparation import masks as parsing


@pytest.fixture
def table(tmp_path) -> Path:
    """Four sound photos of two people with boxes, and one row for each thing that can be wrong."""
    folder = tmp_path / "photos"
    for number in range(4):
        make_photo(folder / f"{number}.png", number)
    rows = [
        {"path": f"{n}.png", "caption": c, "identity": i, "bbox": BOX}
        for n, (c, i) in enumerate([("one", "ann"), ("二人目", "ann"), ("", "bob"), ("صورة", "bob")])
    ]
    make_photo(folder / "blurred.png", blur=6)
    make_photo(folder / "small.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:500])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    Image.new("L", (160, 120), 0).save(folder / "nothing-mask.png")
    Image.new("L", (160, 120), 255).save(folder / "everything-mask.png")
    Image.new("L", (60, 120), 255).save(folder / "narrow-mask.png")
    rows += [
        {"path": "gone.png", "bbox": BOX},
        {"path": "cut.png", "bbox": BOX},
        {"path": "empty.png", "bbox": BOX},
        {"path": "text.png", "bbox": BOX},
        {"path": "blurred.png", "bbox": BOX},
        {"path": "small.png", "bbox": [50, 30, 70, 50]},
        {"path": "0.png", "id": "outside", "bbox": [500, 500, 600, 600]},
        {"path": "1.png", "id": "backwards", "bbox": [90, 30, 50, 90]},
        {"path": "2.png", "id": "no face in the mask", "bbox": BOX, "mask_path": "nothing-mask.png"},
        {"path": "3.png", "id": "all face", "bbox": BOX, "mask_path": "everything-mask.png"},
        {"path": "./3.png", "id": "narrow mask", "bbox": BOX, "mask_path": "narrow-mask.png"},
    ]
    seen = {row["path"] for row in rows[:4]}
    for row in rows[4:]:  # a table names each photo once
        if row["path"] in seen:
            copy = folder / f"copy of {row['id']}.png"
            copy.write_bytes((folder / row["path"]).read_bytes())
            row["path"] = copy.name
    return write_table(folder / "table.jsonl", rows)


REASONS = {
    "gone.png": "missing file",
    "cut.png": "unreadable photo",
    "empty.png": "empty file",
    "text.png": "unreadable photo",
    "blurred.png": "blurred face",
    "small.png": "small face",
    "outside": "bad face box",
    "backwards": "bad face box",
    "no face in the mask": "empty mask",
    "all face": "full mask",
    "narrow mask": "unreadable mask",
}


def test_every_photo_is_kept_or_dropped_with_its_reason(table, tmp_path):
    output = tmp_path / "dataset"
    summary = run(table, output)
    assert dropped_of(output) == REASONS
    assert summary["photos"] == 15 and summary["kept"] == 4
    assert summary["dropped"] == {"unreadable photo": 2, "bad face box": 2} | {
        reason: 1 for reason in REASONS.values() if reason not in ("unreadable photo", "bad face box")
    }
    rows = rows_of(output)
    assert [row["caption"] for row in rows] == ["one", "二人目", "", "صورة"]
    assert [row["identity"] for row in rows] == ["ann", "ann", "bob", "bob"]
    assert summary["captions"] == {"given": 3, "none": 1} and summary["identities"] == 2
    assert json.loads((output / "summary.json").read_text()) == summary
    row = rows[0]
    assert (row["width"], row["height"], row["bbox"], row["detector"]) == (160, 120, BOX, "given")
    assert row["square_bbox"] == [47.0, 27.0, 113.0, 93.0]  # 1.1 × 60 around (80, 60)
    assert row["mask_kind"] == "ellipse from box" and 0.1 < row["mask_area"] < 0.5
    with Image.open(output / row["crop_path"]) as crop, Image.open(output / row["mask_path"]) as mask:
        assert crop.size == (224, 224) and mask.size == (160, 120)
        assert set(np.unique(np.asarray(mask))) == {0, 255}
        assert mask.getpixel((80, 55)) == 255 and mask.getpixel((5, 5)) == 0
    records, problems = read_manifest(output / "manifest.jsonl")
    assert len(records) == 4 and not problems and records[0].path.samefile(table.parent / "0.png")


def test_table_of_the_output_trains_and_can_be_prepared_again(table, tmp_path):
    run(table, tmp_path / "first")
    run(tmp_path / "first/manifest.jsonl", tmp_path / "second")
    first, second = rows_of(tmp_path / "first"), rows_of(tmp_path / "second")
    for a, b in zip(first, second, strict=True):
        assert (a["id"], a["bbox"], a["square_bbox"], a["caption"]) == (
            b["id"],
            b["bbox"],
            b["square_bbox"],
            b["caption"],
        )
        assert b["mask_kind"] == "given"


def test_second_run_does_nothing_and_changes_nothing(table, tmp_path, monkeypatch):
    output = tmp_path / "dataset"
    run(table, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    monkeypatch.setattr(command, "Pipeline", lambda *_: pytest.fail("worked again on photos that were done"))
    run(table, output)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_killed_run_goes_on_where_it_stopped(table, tmp_path, monkeypatch):
    whole, output = tmp_path / "whole", tmp_path / "dataset"
    run(table, whole)
    seen: list[str] = []

    class Killed(command.Pipeline):
        def __call__(self, batch):
            if len(seen) >= 6:
                raise KeyboardInterrupt
            seen.extend(photo.id for photo in batch)
            return super().__call__(batch)

    with monkeypatch.context() as patch:
        patch.setattr(command, "Pipeline", Killed)
        with pytest.raises(KeyboardInterrupt):
            run(table, output, "batch_size=3")
    assert not (output / "manifest.jsonl").exists() and len(seen) == 6
    with open(output / "progress.jsonl", "a") as file:
        file.write('{"id": "3.png", "key": [')  # cut off by the kill
    again: list[str] = []

    class Watched(command.Pipeline):
        def __call__(self, batch):
            again.extend(photo.id for photo in batch)
            return super().__call__(batch)

    monkeypatch.setattr(command, "Pipeline", Watched)
    run(table, output)
    assert len(again) == 15 - 6 and not set(again) & set(seen)
    assert (output / "manifest.jsonl").read_bytes() == (whole / "manifest.jsonl").read_bytes()


def test_only_what_changed_is_worked_on_again(table, tmp_path, monkeypatch):
    output = tmp_path / "dataset"
    run(table, output)
    again: list[str] = []

    class Watched(command.Pipeline):
        def __call__(self, batch):
            again.extend(photo.id for photo in batch)
            return super().__call__(batch)

    monkeypatch.setattr(command, "Pipeline", Watched)
    make_photo(table.parent / "1.png", seed=77, size=(180, 130))
    (output / rows_of(output)[2]["crop_path"]).unlink()  # the masks of these photos are one file
    (table.parent / "empty.png").unlink()
    run(table, output)
    assert again == ["1.png", "2.png", "empty.png"]
    assert rows_of(output)[1]["width"] == 180 and dropped_of(output)["empty.png"] == "missing file"
    again.clear()
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows[0] |= {"caption": "another", "identity": "carl"}
    write_table(table, rows)
    run(table, output)
    assert again == [] and rows_of(output)[0]["caption"] == "another" and rows_of(output)[0]["identity"] == "carl"
    run(table, output, "crop.size=112")
    assert len(again) == 15
    again.clear()
    monkeypatch.setattr(parsing, "VERSION", parsing.VERSION + 1)  # masks come out otherwise from now on
    run(table, output, "crop.size=112")
    assert len(again) == 15


def test_two_runs_in_one_folder_are_refused(table, tmp_path, capsys):
    from filelock import FileLock

    (tmp_path / "dataset").mkdir()
    with FileLock(tmp_path / "dataset/prepare.lock"):
        assert command.main([str(table), str(tmp_path / "dataset")]) == 1
    assert "another trainer.prepare is writing to this folder" in capsys.readouterr().err
    assert command.main([str(table), str(tmp_path / "dataset")]) == 0


def test_manifest_says_how_the_crops_were_made(table, tmp_path):
    run(table, tmp_path / "out", "crop.scale=1.3", "crop.border=clamp", "crop.size=64")
    row = rows_of(tmp_path / "out")[0]
    assert (row["crop_scale"], row["crop_border"], row["crop_fill"]) == (1.3, "clamp", 0.5)
    records, _ = read_manifest(tmp_path / "out/manifest.jsonl")
    assert {record.rule for record in records} == {CropRule(1.3, "clamp", 0.5)} == {common_rule(records)}
    with Image.open(table.parent / "0.png") as photo, Image.open(tmp_path / "out" / row["crop_path"]) as crop:
        again = crop_face(pictures.to_tensor(photo.convert("RGB")), tuple(row["bbox"]), 64, 1.3, 0.5, "clamp")
        assert (pictures.to_tensor(crop) - again).abs().max() <= 0.5 / 255 + 1e-6  # as the nodes cut it
    run(table, tmp_path / "plain")
    older = [
        {name: value for name, value in row.items() if not name.startswith("crop_")}
        for row in rows_of(tmp_path / "plain")
    ]
    write_table(tmp_path / "plain/older.jsonl", older)
    assert common_rule(read_manifest(tmp_path / "plain/older.jsonl")[0]) == CropRule(1.1, "pad", 0.5)
    both, _ = read_manifest([tmp_path / "out/manifest.jsonl", tmp_path / "plain/older.jsonl"])
    with pytest.raises(TrainerError, match=r"made in 2 ways \(4 with 1.3, clamp, fill 0.5, 4 with 1.1, pad"):
        common_rule(both)
    older[0]["crop_border"] = "cut"
    write_table(tmp_path / "plain/older.jsonl", older)
    with pytest.raises(TrainerError, match="crop_border: Input should be 'pad' or 'clamp', found 'cut'"):
        read_manifest(tmp_path / "plain/older.jsonl")


def test_no_two_photos_share_a_file(tmp_path):
    # The first pair of such names whose 32-bit hashes are equal: at 112,000 photos one is to be expected.
    for seed, name in enumerate(("21027/a.png", "47608/a.png")):
        make_photo(tmp_path / "photos" / name, seed)
    rows = [{"path": name, "bbox": BOX} for name in ("21027/a.png", "47608/a.png")]
    run(write_table(tmp_path / "photos/t.jsonl", rows), tmp_path / "out")
    first, second = rows_of(tmp_path / "out")
    assert first["crop_path"] != second["crop_path"]
    crops = [Image.open(tmp_path / "out" / row["crop_path"]).tobytes() for row in (first, second)]
    assert crops[0] != crops[1]


def test_files_are_named_by_their_contents_in_folders(table, tmp_path):
    output = tmp_path / "dataset"
    run(table, output)
    for row in rows_of(output):
        for column, folder in (("mask_path", "masks"), ("crop_path", "crops")):
            path = output / row[column]
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            assert row[column] == f"{folder}/{digest[:2]}/{digest}.png"
    row = rows_of(output)[0]
    (output / row["crop_path"]).write_bytes(b"")  # the disk lost it
    run(table, output, "crop.size=112")
    run(table, output)
    Image.open(output / row["crop_path"]).load()


def test_name_of_any_length_can_be_prepared(tmp_path):
    name = "n" * 245 + ".png"
    make_photo(tmp_path / "photos" / name)
    run(write_table(tmp_path / "photos/t.jsonl", [{"path": name, "bbox": BOX}]), tmp_path / "out")
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [name]


def test_note_on_consent_goes_into_the_manifest(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        make_photo(tmp_path / f"photos/{number}.png", seed=number)
    rows = [{"path": f"{number}.png", "bbox": BOX} for number in range(3)]
    rows[1]["consent"] = "signed 2026-11-30"
    photos = write_table(tmp_path / "photos/t.jsonl", rows)
    summary = run(photos, tmp_path / "out")
    assert [row.get("consent") for row in rows_of(tmp_path / "out")] == [None, "signed 2026-11-30", None]
    assert summary["consent"] == {"noted": 1, "not noted": 2}
    summary = run(photos, tmp_path / "out", "consent=model release")
    assert [row["consent"] for row in rows_of(tmp_path / "out")] == [
        "model release", "signed 2026-11-30", "model release",
    ]  # fmt: skip
    assert summary["consent"] == {"noted": 3, "not noted": 0}
    assert run(photos, tmp_path / "out")["consent"] == {"noted": 1, "not noted": 2}


def test_captions_can_be_required(table, tmp_path):
    summary = run(table, tmp_path / "dataset", "caption.missing=drop")
    assert summary["kept"] == 3 and dropped_of(tmp_path / "dataset")["2.png"] == "no caption"


def test_parquet_and_csv(table, tmp_path):
    with open(table.with_suffix(".csv"), "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "identity", "bbox"])
        writer.writerow(["0.png", 'with "quotes", and commas', "ann", "50, 30, 110, 90"])
        writer.writerow(["1.png", "", "", "[50 30 110 90]"])
    run(table.with_suffix(".csv"), tmp_path / "dataset", "manifest=parquet")
    records, _ = read_manifest(tmp_path / "dataset/manifest.parquet")
    assert [record.caption for record in records] == ['with "quotes", and commas', ""]
    assert [record.identity for record in records] == ["ann", None]
    assert records[0].bbox == (50.0, 30.0, 110.0, 90.0) and records[0].photo_hash is not None


@pytest.mark.slow
def test_other_processes_give_the_same_manifest(table, tmp_path):
    run(table, tmp_path / "here", "batch_size=2")
    run(table, tmp_path / "there", "batch_size=2", "workers=2")
    assert (tmp_path / "here/manifest.jsonl").read_bytes() == (tmp_path / "there/manifest.jsonl").read_bytes()


# --- the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "nowhere", "no such folder or table, and no file matches it as a glob"),
        (lambda folder: folder, "no photos among 0 file(s)"),
        (lambda folder: folder / "*.jpg", "no file matches"),
        (lambda folder: write_table(folder / "t.jsonl", [{"file": "a.png"}]), "row 1: no path; the columns are file"),
        (lambda folder: write_table(folder / "t.jsonl", [{"path": "a"}] * 2), "row 2: a was in row 1 already"),
        (
            lambda folder: write_table(folder / "t.jsonl", [{"path": "a", "caption": [1]}]),
            "caption: Input should be a valid string, found [1]",
        ),
        (lambda folder: write_table(folder / "t.csv", []), "holds no rows"),
    ],
)
def test_input_that_is_not_there_is_one_line_and_exit_code_one(make, expected, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    assert command.main([str(make(folder)), str(tmp_path / "out")]) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out/manifest.jsonl").exists()


def test_unquoted_commas_in_a_csv(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("path,caption\na.png,one, two\n")
    assert command.main([str(tmp_path / "t.csv"), str(tmp_path / "out")]) == 1
    assert "row 1: more fields than the header has; quote captions with commas" in capsys.readouterr().err


def test_nothing_kept_is_an_error(tmp_path, capsys):
    make_photo(tmp_path / "in/a.png", blur=8)
    table = write_table(tmp_path / "in/t.jsonl", [{"path": "a.png", "bbox": BOX}])
    assert command.main([str(table), str(tmp_path / "out"), "sheet=0"]) == 1
    output = capsys.readouterr()
    assert "dropped: blurred face" in output.out and "no photo was kept" in output.err
    assert not (tmp_path / "out/contact_sheet.png").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("filter.min_face=3", "did you mean filter.minimum_face?"),
        ("mask.parser=facer", "there is no face_parsing.farl.lapa"),
        ("caption.model=nowhere", "caption.model nowhere: no folder with a transformers model"),
        ("identity.pattern=abc", "needs a group that is the person"),
        ("identity.pattern=(abc", "not a regular expression"),
        ("identity.source=pattern", "needs a group that is the person"),
    ],
)
def test_settings_that_cannot_be_used_stop_before_any_photo(setting, expected, table, tmp_path, capsys):
    roots = "mask.parser_roots=[]"
    assert command.main([str(table), str(tmp_path / "out"), setting, roots]) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out/progress.jsonl").exists()


# --- real faces ------------------------------------------------------------------------------------------


def test_portrait_is_found_upright_and_a_pair_is_not_one_person(tmp_path):
    pytest.importorskip("facenet_pytorch")
    data = pytest.importorskip("skimage.data")
    portrait = Image.fromarray(data.astronaut())
    folder = tmp_path / "photos"
    folder.mkdir()
    portrait.save(folder / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    portrait.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif, quality=95)
    pair = Image.new("RGB", (1024, 512))
    pair.paste(portrait, (0, 0))
    pair.paste(portrait, (512, 0))
    pair.save(folder / "pair.png")
    Image.fromarray(data.coffee()).save(folder / "coffee.png")
    summary = run(folder, tmp_path / "out", "detect.detector=mtcnn")
    assert dropped_of(tmp_path / "out") == {"coffee.png": "no face", "pair.png": "several faces"}
    turned, upright = rows_of(tmp_path / "out")
    assert upright["bbox"] == pytest.approx([181, 62, 268, 172], abs=4)
    assert turned["bbox"] == pytest.approx(upright["bbox"], abs=4)
    assert upright["mask_kind"] == "ellipse from landmarks" and summary["detectors"] == {"mtcnn": 2}
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        assert sheet.width > 1000 and len(sheet.getcolors(1_000_000)) > 1000
