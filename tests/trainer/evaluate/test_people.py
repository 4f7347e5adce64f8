"""Who is evaluated: the same people and prompts from every kind of input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from feedface_core.errors import FeedFaceError
from trainer.config import EvaluateSettings
from trainer.evaluate.people import Person, read_people

PROMPTS = ["a person on a beach", "a person in a café"]


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def read(people: Path, *overrides: str, **values) -> list[Person]:
    given = {"people": str(people), "output": "out", "pictures": "elsewhere", **values}
    return read_people(EvaluateSettings.load(None, list(overrides), **given))


def told(people: list[Person]) -> dict[str, tuple[list[str], list[str]]]:
    return {
        one.name: ([photo.path.name for photo in one.photos], [request.prompt for request in one.requests])
        for one in people
    }


@pytest.fixture
def photos(tmp_path):
    for name in ("ann/1.png", "ann/2.png", "ben/1.png", "ben/2.png"):
        picture(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("\ufeff" + "\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return tmp_path


EXPECTED = {name: (["1.png", "2.png"], PROMPTS) for name in ("ann", "ben")}


def batch(folder: Path) -> Path:
    people = [{"id": name, "photos": [name]} for name in ("ann", "ben")]
    path = folder / "batch.json"
    path.write_text(json.dumps({"people": people, "prompts": PROMPTS}), encoding="utf-8")
    return path


def rows(folder: Path) -> Path:
    path = folder / "rows.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["person", "photos", "prompt", "KSampler.steps"])
        writer.writerows(
            [name, f"{name}/1.png|{name}/2.png", prompt, 20] for name in ("ann", "ben") for prompt in PROMPTS
        )
    return path


def released(folder: Path) -> Path:
    target = folder / "released"
    target.mkdir()
    for name in ("ann", "ben"):
        group = [{"path": f"../{name}/{number}.png"} for number in (1, 2)]
        own = {"id": name, "caption_list": PROMPTS, "source_group": group, "class_word": "woman"}
        (target / f"{name}.json").write_text(json.dumps(own), encoding="utf-8")
    return target


def manifest(folder: Path) -> Path:
    lines = [
        {"path": f"{name}/{number}.png", "bbox": [1, 1, 7, 7], "identity": name, "caption": PROMPTS[number - 1]}
        for name in ("ann", "ben")
        for number in (1, 2)
    ]
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.mark.parametrize("written", [batch, rows, released, manifest])
def test_same_people_however_written(photos, written):
    assert told(read(written(photos))) == EXPECTED


def test_folder_a_person(photos):
    assert told(read(photos / "ann" / "..", prompts=str(photos / "prompts.txt"))) == EXPECTED


def test_boxes_of_a_manifest_are_kept(photos):
    assert read(manifest(photos))[0].photos[0].box == (1, 1, 7, 7)


def test_ppr10k_as_it_comes(tmp_path):
    """The held-out half, the retouched version, groups of two photos or more, by number; masks are no photos."""
    for split, groups in (("train", ("0", "2")), ("val", ("1433", "1540", "9"))):
        for version in ("source", "target_a", "target_b", "masks_360p"):
            for group in groups:
                for index in range(1 if group == "1540" else 2):
                    picture(tmp_path / "data" / split / version / f"{group}_{index}.tif")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n", encoding="utf-8")
    prompts = {"prompts": str(tmp_path / "prompts.txt")}
    people = read(tmp_path / "data", **prompts)
    assert [one.name for one in people] == ["9", "1433"]
    assert {photo.path.parent.relative_to(tmp_path / "data").as_posix() for photo in people[0].photos} == {
        "val/target_a"
    }
    assert [one.name for one in read(tmp_path / "data" / "train", **prompts)] == ["0", "2"]
    chosen = read(tmp_path / "data" / "val" / "target_b", **prompts)
    assert chosen[1].photos[1].path.as_posix().endswith("val/target_b/1433_1.tif")


def test_seeds_and_rounds(photos):
    [ann, _] = read(batch(photos), "seeds=[3, 4]")
    assert [(one.name, one.seed) for one in ann.requests] == [
        ("ann_01_s3", 3), ("ann_01_s4", 4), ("ann_02_s3", 3), ("ann_02_s4", 4)
    ]  # fmt: skip
    plain = ann.unmodified(6)
    assert plain[:4] == list(ann.requests) and [one.round for one in plain] == [0, 0, 0, 0, 1, 1]
    assert len({one.name for one in ann.unmodified(20)}) == 20
    assert len(ann.unmodified(1)) == 4 and ann.unmodified(0) == []


def test_limits(photos):
    [only] = read(batch(photos), "most_people=1", "most_prompts=1", "most_photos=1")
    assert (only.name, len(only.photos), len(only.requests)) == ("ann", 1, 1)


def test_names_of_files_are_safe(photos):
    people = [{"id": "Ann/../x: <é>", "photos": ["ann"]}, {"id": "..", "photos": ["ben"]}]
    (photos / "odd.json").write_text(json.dumps({"people": people, "prompts": PROMPTS}), encoding="utf-8")
    names = [request.name for one in read(photos / "odd.json") for request in one.requests]
    assert all(Path(name).name == name and not set(name) & set('/\\:*?"<>|') for name in names), names
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"people": [{"id": "a", "photos": ["ann"]}, {"id": "a", "photos": ["ben"]}], "prompts": ["x"]}, "twice"),
        ({"people": [{"id": "Ann", "photos": ["ann"]}, {"id": "ann", "photos": ["ben"]}], "prompts": ["x"]}, "alike"),
        ({"people": [{"id": "a", "photos": ["ann"]}], "prompts": []}, "prompts"),
        ({"people": [{"id": "a", "photos": []}], "prompts": ["x"]}, "photos"),
        ({"people": [{"id": "a", "photos": ["gone.png"]}], "prompts": ["x"]}, "gone.png"),
        ([{"person": "a", "photos": ["ann"]}], "'a' has no prompts"),
        ([{"person": "a", "prompt": "x"}], "'a' has no photos"),
        ([{"prompt": "x"}], "neither a person nor photos"),
        ({"id": "a", "caption_list": [], "source_group": [{"path": "ann"}]}, "caption_list"),
        (7, "expected an object"),
        ([], "nothing in it"),
    ],
)
def test_refused(photos, content, named):
    path = photos / "bad.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(FeedFaceError) as caught:
        read(path)
    assert named in str(caught.value) and "bad.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"\n \n", "holds no prompts"), (b"\xff\xfe", "UTF-8"), (b"x" * 20_000, "10000"), (None, "No such")],
)
def test_refused_prompts(photos, content, named):
    path = photos / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FeedFaceError, match=named) as caught:
        read(photos / "ann" / "..", prompts=str(path))
    assert "own.txt" in str(caught.value)


def test_refused_folders(photos, tmp_path):
    with pytest.raises(FeedFaceError, match="has no prompts"):
        read(photos / "ann" / "..")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FeedFaceError, match="nor photos in this folder"):
        read(tmp_path / "empty")
    picture(tmp_path / "single" / "5_0.png")
    with pytest.raises(FeedFaceError, match="nobody has two photos"):
        read(tmp_path / "single")
    with pytest.raises(FeedFaceError, match="gone"):
        read(tmp_path / "gone")
