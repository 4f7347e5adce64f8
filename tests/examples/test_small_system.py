"""The small system from nothing to the benchmark's table, with a few people and steps; and the demo's sheet."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from examples.small_model import system
from examples.small_model.text import vocabulary
from tools.demo_small import PROMPTS, person_graph, sheet


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="drawing needs Node.js")
@pytest.mark.slow
def test_the_whole_build_gives_a_system_that_the_benchmark_measures(tmp_path, capsys, alone):
    from benchmarks.identity import main as bench
    from examples.small_model.build import main as build
    from feedface_core.files.adapter_file import load_adapter

    work, published = tmp_path / "work", tmp_path / "published"
    build(["--quick", "--work", str(work), "--output", str(published), "--threads", "1"])
    again = tmp_path / "again"
    build(["--quick", "--work", str(tmp_path / "work 2"), "--output", str(again), "--threads", "1"])
    weights, shipped = (
        {path.relative_to(one) for path in one.rglob("*.safetensors")} for one in (published, system.FOLDER)
    )
    assert weights == shipped
    for path in weights:
        assert (published / path).read_bytes() == (again / path).read_bytes(), f"{path} differs when trained again"
    sizes = [
        sum(path.stat().st_size for path in one.rglob("*") if path.is_file()) for one in (published, system.FOLDER)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05) and sizes[1] < 60e6
    found = load_adapter(published / system.ADAPTER)
    assert found.config.prediction == "v" and len(found.config.sites) == 7
    assert str(tmp_path) not in json.dumps(found.metadata)  # nobody's folders go into a published file
    assert "face_encoder" not in {path.name for path in published.iterdir()}
    capsys.readouterr()
    bench(["--quick", "--identities", "8", "--steps", "2", "--model", str(published), "--work", str(work)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["chance"] == 1 / 8
    rows = {row["name"]: row for row in result["rows"]}
    assert all(0 <= row["ceiling"] <= 1 for row in rows.values())
    for equal in ("", ", equal colours"):
        assert rows[f"no face{equal}"]["background"] == 0.0
        assert rows[f"the face's colour alone{equal}"]["similarity"] is None
        assert rows[f"drawings through the autoencoder{equal}"]["top1"] == rows[f"no face{equal}"]["ceiling"]
    for row in (row for name, row in rows.items() if "reference" in name):
        assert row["top1_ci"][0] <= row["top1"] <= row["top1_ci"][1]
        assert 0 < row["background"] < 0.1  # the face changes the picture, eight steps of training not by much


def test_prompts_of_the_demo_use_known_words_only():
    words = set(vocabulary())
    for prompt in PROMPTS:
        assert set(prompt.replace(",", " , ").replace("-", " - ").split()) <= words


def test_graph_draws_each_prompt_twice_from_the_same_noise():
    graph = person_graph(["a.png", "b.png", "c.png"])
    for i in range(len(PROMPTS)):
        plain, face = graph[f"plain_latent{i}"]["inputs"], graph[f"face_latent{i}"]["inputs"]
        assert plain["model"] == ["model", 0] and face["model"] == ["faced", 0]
        assert {**plain, "model": None} == {**face, "model": None}
    assert [graph[f"photo{i}"]["inputs"]["image"] for i in range(3)] == ["a.png", "b.png", "c.png"]
    linked = {value[0] for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)}
    assert linked <= graph.keys()


def test_sheet_has_a_row_for_each_person_with_its_pictures():
    def flat(value: int) -> np.ndarray:
        return np.full((64, 64, 3), value, np.uint8)

    row = {"references": [flat(10)] * 4, "plain": [flat(80)] * 4, "face": [flat(160)] * 4}
    row |= {"plain_scores": [(0.0, 5)] * 4, "face_scores": [(0.9, 0)] * 4}
    page = np.asarray(sheet([row, row]))
    one = np.asarray(sheet([row]))
    assert page.shape[0] > one.shape[0] and page.shape[1] == one.shape[1]
    cell = (64 * 3) ** 2
    for value, count in ((10, 1), (80, 4), (160, 4)):
        assert (one == value).all(-1).sum() >= 0.98 * count * cell
