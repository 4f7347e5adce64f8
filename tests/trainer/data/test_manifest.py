"""Manifests, and what happens with rows and files that cannot be used."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from support.small_training import make_config, make_photos

from trainer.data.dataset import FaceDataset, TensorShapes
from trainer.data.manifest import read_manifest, write_rows
from trainer.data.records import fingerprint
from trainer.errors import TrainerError

SHAPES = TensorShapes((4, 8, 8))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def make_dataset(manifest, **changes):
    config = make_config(manifest.parent, manifest, manifest.parent / "run", **changes)
    return FaceDataset(read_manifest(manifest)[0], config, SHAPES)


def change_row(manifest, target, **changes):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[1].update(changes)
    target.write_text("\n".join(json.dumps(row) for row in rows))
    return target


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"path": "gone.png"}, "gone.png: no such file"),
        ({"path": None}, "path: Field required"),
        ({"path": ""}, "path: Field required"),
        ({"mask_path": "gone-mask.png"}, "mask_path"),
        ({"bbox": None}, "bbox: Field required"),
        ({"bbox": [5, 5, 4]}, "bbox: a box is four numbers x0, y0, x1, y1 in pixels, found '[5, 5, 4]'"),
        ({"bbox": [5, 5, 4, 9]}, "bbox: a box is x0, y0, x1, y1 with x0 < x1 and y0 < y1, found 5, 5, 4, 9"),
        ({"bbox": [5, 5, float("nan"), 9]}, "bbox: a box must hold finite numbers, found 5.0, 5.0, nan, 9.0"),
        ({"square_bbox": [5, 5, float("inf"), 9]}, "square_bbox: a box must hold finite numbers"),
        ({"caption": 3}, "caption: Input should be a valid string, found 3"),
        ({"width": 0}, "width: Input should be greater than 0, found 0"),
        ({"crop_scale": float("nan")}, "crop_scale: Input should be a finite number, found nan"),
        ({"crop_scale": 0}, "crop_scale: Input should be greater than 0, found 0"),
        ({"crop_fill": 1.5}, "crop_fill: Input should be less than or equal to 1, found 1.5"),
        ({"crop_border": "cut"}, "crop_border: Input should be 'pad' or 'clamp', found 'cut'"),
        ({"photo_hash": "xyz"}, "photo_hash: invalid literal for int() with base 16: 'xyz'"),
        ({"crop_hash": "f" * 17}, "crop_hash: Input should be less than 18446744073709551616"),
        ({"identity": [1]}, "identity: Input should be a valid string, found [1]"),
        ({"bbox": None, "caption": 3}, "caption: Input should be a valid string, found 3; bbox: Field required"),
    ],
)
def test_rows_that_cannot_be_used_are_named_or_left_out(manifest, changes, expected):
    changed = change_row(manifest, manifest.parent / "changed.jsonl", **changes)
    with pytest.raises(TrainerError) as error:
        read_manifest(changed)
    assert "1 of 12 manifest rows cannot be used" in str(error.value) and "row 2" in str(error.value)
    assert expected in str(error.value)
    records, dropped = read_manifest(changed, drop_missing=True)
    assert len(records) == 11 and len(dropped) == 1 and expected in dropped[0]


def test_manifests_that_cannot_be_used(tmp_path):
    for name, content, expected in (
        ("none.jsonl", None, "no such file; python -m trainer.prepare makes one"),
        ("empty.jsonl", "\n", "holds no rows"),
        ("broken.jsonl", '{"path": "a.jpg"\n', "line 1: not JSON"),
        ("list.jsonl", "[1]\n", "line 1: expected an object"),
        ("table.xlsx", "x", "expected .jsonl or .parquet, found .xlsx"),
        ("broken.parquet", "x", "broken.parquet: cannot be read: .*Parquet"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(TrainerError, match=expected.replace("(", r"\(")):
            read_manifest(tmp_path / name)


def test_released_rows_parquet_and_captions_of_any_script(manifest, tmp_path):
    row = json.loads(manifest.read_text().splitlines()[0])
    folder = manifest.parent
    released = {name: row[name] for name in ("width", "height", "bbox", "square_bbox")}
    released |= {"path": str(folder / row["path"]), "mask_path": str(folder / row["mask_path"])}
    rows = [released | {"caption": text} for text in ("", "  人物の写真 ", "صورة شخص 🙂", None)]
    for name in ("m.jsonl", "m.parquet"):
        write_rows(tmp_path / name, rows)
        records, _ = read_manifest(tmp_path / name)
        assert [record.caption for record in records] == ["", "人物の写真", "صورة شخص 🙂", ""]
        assert len({record.id for record in records}) == 4  # the same photo four times
        assert records[0].identity is None and records[0].mask_path.is_file()


def test_rows_have_their_defaults_and_a_fingerprint_that_stays(tmp_path):
    """Checkpoints hold the fingerprint of the records they were trained on: no version may change it."""
    (tmp_path / "a.png").touch()
    rows = [{"path": "a.png", "bbox": [10, 20, 50, 40], "identity": 7, "mask_path": "", "width": 96, "more": [1]}]
    rows.append(rows[0] | {"id": 3, "crop_scale": 1.3, "photo_hash": "00ff", "mask_path": "a.png", "caption": " b "})
    write_rows(tmp_path / "m.jsonl", rows)
    first, second = read_manifest(tmp_path / "m.jsonl")[0]
    assert (first.id, first.identity, first.caption, first.mask_path, first.rule) == (
        "a.png",
        "7",
        "",
        None,
        (1.1, "pad", 0.5),
    )
    assert first.square == pytest.approx((8, 8, 52, 52)) and second.square == pytest.approx((4, 4, 56, 56))
    assert (second.id, second.caption, second.photo_hash) == ("3", "b", 255)
    assert fingerprint([first, second]) == "f7a42ae4938fbb58"


def test_square_that_is_not_square_is_made_so(manifest):
    changed = change_row(manifest, manifest.parent / "flat.jsonl", square_bbox=[10, 10, 50, 30])
    assert read_manifest(changed)[0][1].square == (10.0, 0.0, 50.0, 40.0)


def test_empty_mask_falls_back_to_the_standard_loss(manifest, caplog):
    Image.new("L", (96, 80), 0).save(manifest.parent / "nothing.png")
    Image.new("L", (96, 80), 255).save(manifest.parent / "everything.png")
    changed = change_row(manifest, manifest.parent / "empty.jsonl", mask_path="nothing.png")
    dataset = make_dataset(changed, loss__standard_probability=0.0)
    assert dataset[1, 0]["draws"].standard_loss and "the mask is empty" in caplog.text
    assert not dataset[0, 0]["draws"].standard_loss
    full = make_dataset(change_row(manifest, changed, mask_path="everything.png"), loss__standard_probability=0.0)
    assert full[1, 0]["mask"].eq(1).all() and not full[1, 0]["draws"].standard_loss


@pytest.mark.parametrize("broken", ["photo", "mask", "shape"])
def test_files_that_cannot_be_read_name_the_sample(manifest, broken):
    folder = manifest.parent
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:200])
    Image.new("L", (50, 80), 255).save(folder / "narrow.png")
    changes, expected = {
        "photo": ({"path": "broken.png"}, "broken.png: not a readable picture"),
        "mask": ({"mask_path": "broken.png"}, "broken.png: not a readable mask"),
        "shape": ({"mask_path": "narrow.png"}, "mask is 50 × 80, which is not the shape of its photo, 96 × 80"),
    }[broken]
    dataset = make_dataset(change_row(manifest, folder / f"{broken}.jsonl", **changes))
    replaced = dataset[1, 0]
    name = dataset.records[1].id
    assert replaced["id"] != name and [own for own, _ in replaced["unreadable"]] == [name]
    assert expected in replaced["unreadable"][0][1]
