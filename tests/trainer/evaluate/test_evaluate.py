"""The whole evaluation: drawn, measured, written, and gone on with after an interruption."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.evaluation import make_small
from support.small_training import make_config, train_in_process_of_its_own

from feedface_core.files.provenance import SOURCE_TYPES, source_type
from trainer.errors import TrainerError
from trainer.evaluate import __main__ as command
from trainer.evaluate import drawing
from trainer.evaluate.__main__ import evaluate


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_small(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def evaluated(small):
    output = small.root / "evaluated"
    return output, evaluate(small.settings(output))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_files_tell_the_same(evaluated):
    output, results = evaluated
    assert json.loads((output / "results.json").read_text("utf-8")) == json.loads(json.dumps(results))
    rows = list(csv.DictReader(open(output / "results.csv", encoding="utf-8")))
    assert [sum(row["kind"] == kind for row in rows) for kind in ("face", "unmodified")] == [8, 12]
    assert {source_type((output / row["file"]).read_bytes()) for row in rows} == {SOURCE_TYPES["generated"]}
    own = [row for row in rows if row["person"] == "person 1" and row["kind"] == "face"]
    person = next(one for one in results["people"] if one["id"] == "person 1")
    assert np.mean([float(row["similarity"]) for row in own]) == pytest.approx(person["face"]["similarity"], abs=1e-5)
    mean = np.mean([one["face"]["similarity"] for one in results["people"]])
    assert results["rows"]["face"]["similarity"]["value"] == pytest.approx(mean, abs=1e-5)
    table = (output / "results.md").read_text("utf-8")
    assert (
        f"{mean:.3f}" in table and "adapter's encoder" in table and "| DreamBooth, published | InsightFace ¹ |" in table
    )
    assert {"contact_sheet.png", "similarity.png"} <= {path.name for path in output.iterdir()}


def test_strength_0_is_the_unmodified_model(small, evaluated, tmp_path):
    """Both are drawn in the same noise, so that what differs is the face."""
    evaluate(small.settings(tmp_path, "sampling.strength=0"))
    for path in sorted((tmp_path / "pictures").iterdir()):
        plain = pixels(tmp_path / "unmodified" / path.name)
        assert (pixels(path) == plain).all()
        assert (pixels(evaluated[0] / "pictures" / path.name) != plain).any()
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    rows = results["rows"]
    assert rows["face"]["similarity"] == rows["unmodified"]["similarity"]


def test_goes_on_where_it_was_stopped(small, evaluated, tmp_path, monkeypatch):
    count, write = 0, drawing.write_picture

    def stop_at_the_sixth(*arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(drawing, "write_picture", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        evaluate(small.settings(tmp_path))
    assert len(contents(tmp_path)) == 5
    assert not (tmp_path / "results.json").exists()
    evaluate(small.settings(tmp_path))
    whole = contents(evaluated[0])
    assert contents(tmp_path) == whole
    assert count == 6 + len(whole) - 2 - 5, "what was there has been drawn again"  # two are sheet and plots


def test_only_what_changed_is_drawn_again(small, evaluated, tmp_path, monkeypatch):
    evaluate(small.settings(tmp_path))
    before = contents(tmp_path)
    victim, cut = tmp_path / "pictures" / "person_1_01.png", tmp_path / "unmodified" / "person_2_01.png"
    victim.unlink()
    cut.write_bytes(cut.read_bytes()[:200])
    drawn, write = [], drawing.write_picture
    monkeypatch.setattr(drawing, "write_picture", lambda *all_: drawn.append(all_[1]) or write(*all_))
    evaluate(small.settings(tmp_path))
    assert sorted(drawn) == sorted([victim, cut]) and contents(tmp_path) == before
    drawn.clear()
    evaluate(small.settings(tmp_path, "sampling.text_scale=2"))
    assert len(drawn) == 20, "other guidance, other pictures"
    drawn.clear()
    evaluate(small.settings(tmp_path, "sampling.text_scale=2", "sampling.strength=0.5"))
    assert len(drawn) == 8, "the strength is of the face alone"


def test_pictures_made_elsewhere(small, evaluated, tmp_path):
    """Measured as if drawn here, by name and by the queue's summary."""
    output, results = evaluated
    named = evaluate(
        small.settings(
            tmp_path / "named",
            "recogniser=encoder",
            pictures=str(output / "pictures"),
            unmodified_pictures=str(output / "unmodified"),
            adapter=str(small.adapter),
        )
    )
    assert named["rows"]["face"]["similarity"] == results["rows"]["face"]["similarity"]
    queue = tmp_path / "queue"
    (queue / "pictures").mkdir(parents=True)
    jobs = []
    for number, row in enumerate(csv.DictReader(open(output / "results.csv", encoding="utf-8"))):
        if row["kind"] == "face":
            file = f"job {number}.png"
            (queue / "pictures" / file).write_bytes((output / row["file"]).read_bytes())
            jobs.append({"id": f"job {number}", "person": row["person"], "prompt": row["prompt"], "files": [file]})
    (queue / "summary.json").write_text(json.dumps({"done": 8, "jobs": jobs}), encoding="utf-8")
    given = {"pictures": str(queue), "adapter": str(small.adapter)}
    told = evaluate(small.settings(tmp_path / "told", "recogniser=encoder", **given))
    assert told["rows"]["face"]["similarity"] == results["rows"]["face"]["similarity"]
    assert told["rows"]["face"]["similarity_normalised"]["value"] is None and "unmodified" not in told["rows"]
    assert any("no pictures of the unmodified model" in note for note in told["notes"])
    (queue / "pictures" / jobs[3]["files"][0]).unlink()
    with pytest.raises(TrainerError, match="1 of 8 pictures are missing"):
        evaluate(small.settings(tmp_path / "less", "recogniser=encoder", **given))
    less = evaluate(small.settings(tmp_path / "less", "recogniser=encoder", "missing=skip", **given))
    assert less["pictures"] == 7 and any("1 pictures are missing" in note for note in less["notes"])


@pytest.mark.parametrize(
    "kind",
    [{"adapter__background": True}, {"adapter__text_tokens": {}, "adapter__encoder": {"pooling": "class"}}],
    ids=["two streams", "text tokens"],
)
def test_other_kinds_of_adapters(tmp_path, kind):
    encoder = {
        "path": str(tmp_path / "small" / "models" / "clip"),
        "image_size": 64,
        **kind.get("adapter__encoder", {}),
    }
    small = make_small(tmp_path / "small", **{**kind, "adapter__encoder": encoder})
    evaluate(small.settings(tmp_path / "out", "most_people=1", "unmodified=1"))
    for path in (tmp_path / "out" / "pictures").iterdir():
        assert (pixels(path) != pixels(tmp_path / "out" / "unmodified" / path.name)).any()


@pytest.mark.slow
def test_checkpoint_instead_of_a_file(small, tmp_path):
    config = make_config(small.root / "models", small.manifest, tmp_path / "run", train__steps=2)
    assert train_in_process_of_its_own(config).returncode == 0
    results = evaluate(small.settings(tmp_path / "out", "most_people=1", "unmodified=0", adapter=str(tmp_path / "run")))
    assert (tmp_path / "out" / "adapter.safetensors").is_file() and results["pictures"] == 2


def test_quick_and_its_overrides():
    seen = command.parse(["p.json", "out", "--quick", "most_prompts=5", "--pictures", "folder"])
    assert (seen.most_people, seen.most_prompts, seen.sampling.steps) == (3, 5, 8)
    assert (seen.people, seen.output, seen.pictures) == ("p.json", "out", "folder")


def test_second_run_in_the_same_folder(small, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / command.LOCK), pytest.raises(TrainerError, match="another trainer.evaluate"):
        evaluate(small.settings(tmp_path))
