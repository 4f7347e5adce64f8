"""From tasks to jobs: what a task sets is all that changes in the workflow; faults are told before the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_comfyui import OBJECT_INFO, WORKFLOW, FakeComfyUI

from feedface_core.errors import FeedFaceError
from feedface_core.files.tasks import Task
from tools.queue.plan import FORBIDDEN, LONGEST_NAME, make_plan
from tools.queue.references import ENCODER, fit_photos
from tools.queue.workflow import Target, find_target, find_targets, read_workflow, typed

ROOT = Path(__file__).resolve().parents[3]
WORKFLOWS = sorted((ROOT / "workflows/api").glob("*.json"))
TARGETS = find_targets(WORKFLOW)

texts = st.text(min_size=1)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
tasks = st.lists(
    st.builds(
        Task,
        where=st.integers(2, 9).map("row {}".format),
        name=st.none(),
        person=st.none() | names,
        photos=st.sampled_from([(), (Path("a.png"),)]),
        prompt=st.none() | texts,
        seed=st.none() | st.integers(0, 2**64 - 1),
        settings=st.dictionaries(
            st.sampled_from(["KSampler.steps", "#3.cfg"]), st.integers(1, 100) | st.just("7"), max_size=2
        ),
    ),
    min_size=1,
    max_size=6,
)


def plan(made: list[Task], seeds: tuple[int, ...] = (), workflow: dict[str, Any] = WORKFLOW) -> list[Any]:
    return make_plan(made, workflow, find_targets(workflow), OBJECT_INFO, seeds, lambda path: path.name)


@settings(deadline=None)
@given(made=tasks, seeds=st.lists(st.integers(0, 99), max_size=3, unique=True).map(tuple))
def test_only_what_a_task_sets_changes(made: list[Task], seeds: tuple[int, ...]) -> None:
    before = deepcopy(WORKFLOW)
    try:
        jobs = plan(made, seeds)
    except FeedFaceError as problem:  # a person whose name cannot be that of a file
        assert "cannot name a file" in str(problem) or "is there twice" in str(problem)
        return
    assert WORKFLOW == before
    assert len(jobs) == sum(1 if task.seed is not None else len(seeds) or 1 for task in made)
    assert len({job.name.casefold() for job in jobs}) == len(jobs)
    for job in jobs:
        assert not FORBIDDEN.search(job.name) and len(job.name) <= LONGEST_NAME
        filled, task = job.filled({Path("a.png"): "stored.png"}), job.task
        expected = deepcopy(before)
        for node, name, value in (("1", "image", task.photos and "stored.png"), ("2", "text", task.prompt)):
            if value:
                expected[node]["inputs"][name] = value
        if task.seed is not None:
            expected["3"]["inputs"]["seed"] = task.seed
        for setting, value in task.settings.items():
            expected["3"]["inputs"][setting.split(".")[1]] = int(value)
        assert filled == expected
        assert job.metadata["id"] == job.name and job.metadata["seed"] == filled["3"]["inputs"]["seed"]


@settings(deadline=None)
@given(made=tasks)
def test_equal_digests_are_equal_jobs(made: list[Task]) -> None:
    try:
        jobs = plan(made)
    except FeedFaceError:
        return
    same = {}
    for job in jobs:
        inputs = json.dumps(job.filled({Path("a.png"): "stored.png"}), sort_keys=True)
        assert same.setdefault(job.digest, inputs) == inputs
    assert len(set(same.values())) == len(same)
    assert [job.digest for job in plan(made)] == [job.digest for job in jobs]


def test_the_content_of_a_photo_counts() -> None:
    task = Task("row 2", photos=(Path("a.png"),))
    one, two = (make_plan([task], WORKFLOW, TARGETS, OBJECT_INFO, (), lambda _, c=content: c) for content in "ab")
    assert one[0].digest != two[0].digest


def test_names() -> None:
    named = plan(
        [
            Task("row 2", "mine"),
            Task("row 3", None, "a/b", prompt="x"),
            Task("row 4", None, "a/b", prompt="y"),
            Task("row 5", prompt="y"),
            Task("batch", None, "c", prompt="y", prompt_name="beach"),
        ]
    )
    assert [job.name for job in named] == ["mine", "a_b_01", "a_b_02", "picture_01", "c_beach"]
    assert [job.name for job in plan([Task("row 2", "mine")], (3, 5))] == ["mine_s3", "mine_s5"]


def shipped() -> list[tuple[str, dict[str, Any]]]:
    return [(path.stem, read_workflow(path)) for path in WORKFLOWS]


#: Graphs that join their photos before a node of the pack sees them.
BATCHED = {"feedface_small", "feedface_batch_small", "feedface_batch_unidiffuser"}


@pytest.mark.parametrize(("name", "workflow"), shipped())
def test_shipped_workflows_show_where_things_go(name: str, workflow: dict[str, Any]) -> None:
    targets = find_targets(workflow)
    loaders = {key for key, node in workflow.items() if node["class_type"] == "LoadImage"}
    assert targets.seed, name
    assert all(workflow[node]["class_type"] == "LoadImage" for node, _ in targets.photos)
    if name in BATCHED:  # whose photos they are does not show, so the titles say it
        named = [f"{workflow[key]['_meta']['title']}.image" for key in sorted(loaders)]
        assert targets.photos == () and {node for node, _ in find_targets(workflow, photos=named).photos} == loaders
    elif loaders:
        assert targets.photos, name
    for node, input_name in targets.prompt:
        assert workflow[node]["class_type"] == "CLIPTextEncode" and "egative" not in workflow[node]["_meta"]["title"]
        assert isinstance(workflow[node]["inputs"][input_name], str)


def test_photos_in_the_order_of_their_titles() -> None:
    workflow = {
        str(number): {"class_type": "LoadImage", "inputs": {"image": "x"}, "_meta": {"title": f"Photo {number}"}}
        for number in (10, 2, 1)
    }
    workflow["9"] = {"class_type": "LoadImage", "inputs": {"image": "x"}, "_meta": {"title": "Pose"}}
    workflow["f"] = {"class_type": "FeedFaceX", "inputs": {"a": ["10", 0], "b": ["2", 0], "c": ["1", 0]}}
    assert [node for node, _ in find_targets(workflow).photos] == ["1", "2", "10"]


ENCODERS = {
    ENCODER: {"input": {"required": {"crops": ["IMAGE"]}, "optional": {f"crops_{i}": ["IMAGE"] for i in range(2, 6)}}}
}


def several(loaders: int, **encoder: Any) -> dict[str, Any]:
    """Loaders, each with a detector and a preview of it, before one encoder."""
    prompt: dict[str, Any] = {"e": {"class_type": ENCODER, "inputs": dict(encoder)}}
    for i in range(1, loaders + 1):
        prompt[f"l{i}"] = {"class_type": "LoadImage", "inputs": {"image": ""}, "_meta": {"title": f"Photo {i}"}}
        prompt[f"d{i}"] = {"class_type": "FeedFaceDetectFaces", "inputs": {"image": [f"l{i}", 0], "min_size": 32}}
        prompt[f"p{i}"] = {"class_type": "PreviewImage", "inputs": {"images": [f"d{i}", 1]}}
        prompt["e"]["inputs"]["crops" if i == 1 else f"crops_{i}"] = [f"d{i}", 0]
    return prompt


@given(loaders=st.integers(1, 5), photos=st.integers(1, 9))
def test_as_many_branches_as_photos(loaders: int, photos: int) -> None:
    before = several(loaders)
    workflow = deepcopy(before)
    fitted, places = fit_photos(workflow, find_targets(workflow).photos, photos, ENCODERS)
    assert workflow == before
    count = min(photos, 5)
    assert len(places) == len(set(places)) == count
    encoder = fitted["e"]["inputs"]
    assert list(encoder) == ["crops", *(f"crops_{i}" for i in range(2, count + 1))]
    for place, (node, slot) in zip(places, encoder.values(), strict=True):
        detector = fitted[node]
        assert slot == 0 and detector["class_type"] == "FeedFaceDetectFaces"
        assert detector["inputs"] == {"image": [place.node, 0], "min_size": 32}
        assert fitted[place.node]["class_type"] == "LoadImage" and place.input == "image"
    links = {value[0] for node in fitted.values() for value in node["inputs"].values() if isinstance(value, list)}
    assert links <= set(fitted)


def test_weights_for_another_number_of_photos_are_refused() -> None:
    workflow = several(3, weights="1, 1, 0.5")
    with pytest.raises(FeedFaceError, match="2 photos, and 'FeedFaceEncodeFaces' has weights for 3: empty its weights"):
        fit_photos(workflow, find_targets(workflow).photos, 2, ENCODERS)


def test_fewer_photos_than_two_encoders_need_are_refused() -> None:
    workflow = several(1) | {
        "r": {"class_type": "LoadImage", "inputs": {"image": ""}},
        "f": {"class_type": ENCODER, "inputs": {"crops": ["r", 0]}},
    }
    with pytest.raises(FeedFaceError, match="1 photos, and the workflow takes 2: add photos"):
        fit_photos(workflow, find_targets(workflow).photos, 1, ENCODERS)


def titled(*titles: str) -> dict[str, Any]:
    return {
        str(i): {"class_type": "Node", "inputs": {"a": 1, "b.c": 2, "link": ["0", 0]}, "_meta": {"title": title}}
        for i, title in enumerate(titles)
    }


def test_a_title_may_hold_dots_and_an_id_may_stand_for_it() -> None:
    assert find_target(titled("v1.5 model"), "v1.5 model.a") == Target("0", "a")
    assert find_target(titled("x", "x"), "#1.a") == Target("1", "a")
    assert find_target(titled("x.a"), "x.a", ("a",)) == Target("0", "a")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("KSampler", "no node is titled"),
        ("Samplr.a", "no node is titled 'Samplr'. Is 'Sampler' meant? The titles: Sampler, twice"),
        ("Sampler.step", "the node 'Sampler' has no input 'step'; it has a, b.c"),
        ("Sampler.link", "this input comes from the node 'Sampler': set it there"),
        ("twice.a", "2 nodes are titled 'twice': rename one, or write the id for it: #1, #2"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, said: str) -> None:
    with pytest.raises(FeedFaceError) as caught:
        find_target(titled("Sampler", "twice", "twice"), name)
    assert said in str(caught.value)


@given(value=st.integers(1, 10000))
def test_a_cell_is_the_number_it_shows(value: int) -> None:
    steps, cfg = ("INT", {"min": 1, "max": 10000}), ("FLOAT", {"min": 0.0, "max": 10000.0})
    assert typed(f" {value} ", steps) == typed(value, steps) == typed(float(value), steps) == value
    assert typed(str(value / 8), cfg) == value / 8
    assert typed(value, ("STRING", {})) == str(value)


@pytest.mark.parametrize(
    ("column", "cell", "said"),
    [
        ("KSampler.steps", "many", "'many' is not a whole number"),
        ("KSampler.steps", "0", "0 is outside 1 to 10000"),
        ("KSampler.steps", "2.5", "'2.5' is not a whole number"),
        ("KSampler.cfg", "nan", "nan is not a finite number"),
        ("KSampler.cfg", "1e999", "inf is not a finite number"),
        ("KSampler.sampler_name", "eulr", "'eulr' is none of euler, dpmpp_2m"),
        ("Sampler.steps", "3", "no node is titled 'Sampler'. Is 'KSampler' meant?"),
        ("KSampler.positive", "x", "this input comes from the node 'Positive prompt': set it there"),
        ("Positive prompt.text", "x", "is filled by another column already"),
        ("id", "a/b", "id 'a/b' holds '/': a file cannot be called so"),
        ("id", "con", "id 'con' cannot name a file"),
        ("id", "Mine", "id 'Mine' is there twice, first in "),
        ("photos", "broken.png", "broken.png is no picture that can be read"),
        ("photos", "short.png", "short.png cannot be read"),
        ("seed", str(2**64), "seed: expected 0 to 18446744073709551615"),
    ],
)
def test_a_fault_is_told_before_anything_is_sent(
    desk: Any, refused: Callable[..., str], column: str, cell: str, said: str
) -> None:
    (desk.folder / "broken.png").write_text("no picture")
    (desk.folder / "short.png").write_bytes((desk.folder / "ben.png").read_bytes()[:60])
    names = ["id", "photos", "prompt"]
    good = {"id": "mine", "photos": "anna_1.png", "prompt": "x"}
    bad = {"id": "other", "photos": "ben.png", "prompt": "y", column: cell}
    names = list(dict.fromkeys([*names, column]))
    lines = [names, [good.get(name, "") for name in names], [bad.get(name, "") for name in names]]
    tasks = desk.write("tasks.csv", "".join(",".join(line) + "\n" for line in lines))
    with FakeComfyUI() as server:
        message = refused(tasks, server)
        assert said in message and f"{tasks}, row 3: " in message
        assert server.received == [] and server.uploads == {} and not desk.output.exists()


@pytest.mark.parametrize(
    ("workflow", "said"),
    [
        ({"nodes": [], "links": []}, "is a workflow as the editor saves it: export it with File, Export (API)"),
        ({}, "is no workflow in API format"),
        ({"1": {"class_type": "X"}}, "is no workflow in API format"),
        (
            {key: node for key, node in WORKFLOW.items() if key != "4"},
            "the workflow saves nothing: add a Save Image node",
        ),
        (
            {key: node for key, node in WORKFLOW.items() if key != "1"},
            "node '3': 'image' is linked to node '1', which is not there",
        ),
        (
            WORKFLOW | {"1": {"class_type": "KSampler", "inputs": {}}},
            'shows no place for the photos: name it with --photo-node "TITLE.input"',
        ),
    ],
)
def test_a_workflow_that_cannot_be_used(
    desk: Any, refused: Callable[..., str], workflow: dict[str, Any], said: str
) -> None:
    desk.workflow.write_text(json.dumps(workflow))
    with FakeComfyUI() as server:
        assert said in refused(desk.tasks(1), server)


def test_a_photo_in_a_column_of_its_own(desk: Any) -> None:
    tasks = desk.write("tasks.jsonl", '{"id": "p", "Photo.image": "ben.png", "Positive prompt.text": "x"}')
    with FakeComfyUI() as server:
        assert desk.run(tasks, server) == 0
        assert list(server.uploads.values()) == [(desk.folder / "ben.png").read_bytes()]
        assert server.received == ["x"]


def test_a_wrong_set_is_told_once(desk: Any, refused: Callable[..., str]) -> None:
    with FakeComfyUI() as server:
        said = refused(desk.tasks(5), server, set="KSampler.cfg=nan")
        assert said == "FeedFace: --set: KSampler.cfg: nan is not a finite number\n" and server.received == []
        assert "--set KSampler.cfg: expected TITLE.INPUT=VALUE" in refused(desk.tasks(5), server, set="KSampler.cfg")


def test_set_holds_for_every_task_that_does_not_say_otherwise(desk: Any) -> None:
    tasks = desk.write("tasks.jsonl", '{"prompt": "x"}\n{"prompt": "y", "KSampler.steps": 9}')
    with FakeComfyUI() as server:
        assert desk.run(tasks, server, set="KSampler.steps=7") == 0
        assert [told["KSampler.steps"] for told in server.metadata] == [7, 9]
