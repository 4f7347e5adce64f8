"""The shipped workflows: both formats equal, nothing unknown in them, and each one queued on a real ComfyUI server."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools.comfy_client import Run
from tools.find_comfyui import COMFYUI_OLDEST
from tools.server import PACK_FOLDER, ComfyServer
from tools.workflow_format import FILES, NOTES, WorkflowError, api_path, problems, to_api

FOLDER = Path(__file__).resolve().parents[1] / "workflows/graphs"
GRAPHS = sorted(FOLDER.glob("*.json"))
#: Those for Stable Diffusion 1.x; the others bring tests of their own, with models of their own.
STABLE_DIFFUSION = [FOLDER / f"feedface_{name}.json" for name in ("portrait", "references", "guider", "two_people")]
MODEL = "tiny_sd1.safetensors"
#: What a workflow is scaled down to, by kind of node.
SMALL: dict[str, dict[str, Any]] = {
    "CheckpointLoaderSimple": {"ckpt_name": MODEL},
    "FeedFaceLoadAdapter": {"adapter_name": MODEL},
    "EmptyLatentImage": {"width": 96, "height": 64},
    "KSampler": {"steps": 2},
    "BasicScheduler": {"steps": 2},
}


def name(path: Path) -> str:
    return path.stem


every_graph = pytest.mark.parametrize("path", GRAPHS, ids=name)
every_stable_diffusion = pytest.mark.parametrize("path", STABLE_DIFFUSION, ids=name)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def object_info(server: ComfyServer) -> dict[str, Any]:
    return server.object_info()


# --- as files


def test_each_graph_has_its_api_file() -> None:
    assert set(STABLE_DIFFUSION) <= set(GRAPHS)
    assert {api_path(path) for path in GRAPHS} == set((FOLDER.parent / "api").iterdir())


def test_server_lists_the_graphs_as_templates_and_nothing_else(server: ComfyServer) -> None:
    """A file in API format would open as an empty graph."""
    listed = server.get("/workflow_templates")[PACK_FOLDER]
    assert sorted(listed) == sorted(path.stem for path in (FOLDER.parents[1] / "example_workflows").glob("*.json"))
    assert len(listed) == len(GRAPHS)


@every_graph
def test_api_file_is_what_the_frontend_makes_of_the_graph(any_comfyui, object_info: dict[str, Any], path: Path) -> None:
    made, written = to_api(read(path), object_info), read(api_path(path))
    for node in (*made.values(), *written.values()):
        if any_comfyui.version == COMFYUI_OLDEST and not node["class_type"].startswith("FeedFace"):
            node.pop("_meta")  # it calls its own nodes by other names
    assert made == written


@every_graph
def test_nothing_in_it_is_unknown_to_the_server(object_info: dict[str, Any], path: Path) -> None:
    assert problems(read(api_path(path)), object_info) == []


@every_graph
def test_links_agree_with_sockets(path: Path) -> None:
    graph = read(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and graph["last_node_id"] >= max(nodes)
    for number, source, slot, target, socket, kind in graph["links"]:
        assert number in nodes[source]["outputs"][slot]["links"] and nodes[source]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][socket]["link"] == number
    sockets = [one for node in nodes.values() for one in node["inputs"]]
    assert sorted(one["link"] for one in sockets if one.get("link")) == sorted(link[0] for link in graph["links"])


@every_graph
def test_a_note_names_every_file_of_ours(path: Path) -> None:
    notes = " ".join(node["widgets_values"][0] for node in read(path)["nodes"] if node["type"] in NOTES)
    for node in read(api_path(path)).values():
        kind = node["class_type"]
        for key, value in node["inputs"].items():
            if kind.startswith("FeedFace") and (kind, key) in FILES and value != "auto":
                assert value in notes, f"{kind} loads {value}: say where that file goes"


@every_graph
def test_nodes_lie_in_a_group_and_apart(path: Path) -> None:
    title = 30  # pixels above a node's position
    graph = read(path)
    boxes = {f"{node['id']} {node['type']}": (*node["pos"], *node["size"]) for node in graph["nodes"]}
    names = list(boxes)
    for index, one in enumerate(names):
        x, y, width, height = boxes[one]
        for other in names[index + 1 :]:
            a, b, c, d = boxes[other]
            apart = x + width <= a or a + c <= x or y + height <= b - title or b + d <= y - title
            assert apart, f"{one} lies over {other}"
        if graph["groups"] and one.split()[1] not in NOTES:
            groups = [group["bounding"] for group in graph["groups"]]
            assert any(
                a <= x and b <= y - title and x + width <= a + c and y + height <= b + d for a, b, c, d in groups
            ), f"{one} sticks out of its group"


# --- the converter itself


def test_conversion_and_its_errors(object_info: dict[str, Any]) -> None:
    sampler = {
        "id": 7,
        "type": "KSampler",
        "order": 1,
        "mode": 0,
        "title": "Mine",
        "inputs": [{"name": "model", "type": "MODEL", "link": 3}, {"name": "positive", "link": None}],
        "widgets_values": [5, "randomize", 20, 8.0, "euler", "normal", 0.5],
    }
    loader = {"id": 2, "type": "CheckpointLoaderSimple", "order": 0, "inputs": [], "widgets_values": ["a.pt"]}
    note = {"id": 9, "type": "Note", "order": 2, "mode": 0, "widgets_values": ["text"]}
    graph = {"nodes": [sampler, note, loader], "links": [[3, 2, 0, 7, 0, "MODEL"]]}
    expected = {
        "seed": 5,
        "steps": 20,
        "cfg": 8.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 0.5,
        "model": ["2", 0],
    }
    prompt = to_api(graph, object_info)
    assert list(prompt) == ["2", "7"]
    assert prompt["7"] == {"inputs": expected, "class_type": "KSampler", "_meta": {"title": "Mine"}}
    assert prompt["2"]["_meta"]["title"] == "Load Checkpoint"
    for changes, message in (
        ({"mode": 4}, "7 .KSampler. is muted or bypassed"),
        ({"type": "Absent"}, "no node of the kind Absent"),
        ({"widgets_values": [5, "randomize", 20]}, "no value for the widget cfg"),
        ({"widgets_values": [*sampler["widgets_values"], "more"]}, "values without a widget: .'more'."),
    ):
        with pytest.raises(WorkflowError, match=message):
            to_api({**graph, "nodes": [{**sampler, **changes}, loader]}, object_info)


def test_problems_are_named(object_info: dict[str, Any]) -> None:
    good = read(api_path(FOLDER / "feedface_portrait.json"))
    ids = {node["class_type"]: key for key, node in good.items()}
    sampler, apply = ids["KSampler"], ids["FeedFaceApply"]

    def said(node: str, **inputs: Any) -> list[str]:
        prompt = deepcopy(good)
        prompt[node]["inputs"].update(inputs)
        return problems(
            {
                key: {**one, "inputs": {k: v for k, v in one["inputs"].items() if v is not None}}
                for key, one in prompt.items()
            },
            object_info,
        )

    assert said(sampler) == []
    assert said(sampler, model=None) == [f"node {sampler} (KSampler): model: missing"]
    assert said(sampler, colour=1) == [f"node {sampler} (KSampler): no input 'colour'"]
    assert said(sampler, steps=0) == [f"node {sampler} (KSampler): steps: 0 is outside 1 to 10000"]
    assert said(apply, strength=True) == [f"node {apply} (FeedFaceApply): strength: True is not FLOAT"]
    assert said(apply, model=[sampler, 0]) == [
        f"node {apply} (FeedFaceApply): model: needs MODEL, linked to LATENT of node {sampler}"
    ]
    assert said(apply, model=["99", 0]) == [
        f"node {apply} (FeedFaceApply): model: linked to node 99, which is not there"
    ]
    assert "'odd' is none of euler" in said(sampler, sampler_name="odd")[0]


# --- on a server


@pytest.fixture(scope="session")
def photos(server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three pictures of one person: a public-domain portrait, its mirror image and a part of it."""
    data = pytest.importorskip("skimage.data")
    portrait = Image.fromarray(data.astronaut())
    pictures = [portrait, portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT), portrait.crop((100, 0, 400, 350))]
    folder = tmp_path_factory.mktemp("photos")
    for index, picture in enumerate(pictures):
        picture.save(folder / f"person_{index}.png")
    return [server.upload(folder / f"person_{index}.png") for index in range(len(pictures))]


def scaled_down(path: Path, photos: list[str]) -> dict[str, Any]:
    """A workflow for the tiny models: only files and sizes are changed."""
    prompt = read(api_path(path))
    left = list(photos)
    for node in prompt.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = left.pop(0)
    return prompt


def changed(prompt: dict[str, Any], kind: str, **inputs: Any) -> dict[str, Any]:
    """The same with other inputs of every node of a kind."""
    prompt = deepcopy(prompt)
    for node in prompt.values():
        if node["class_type"] == kind:
            node["inputs"].update(inputs)
    return prompt


def without_nodes(prompt: dict[str, Any], passed_on: dict[str, str]) -> dict[str, Any]:
    """The same with nodes bypassed: whatever took their output takes their input of the name given, by kind."""

    def source(link: list[Any]) -> list[Any]:
        node = prompt[link[0]]
        inside = passed_on.get(node["class_type"])
        return source(node["inputs"][inside]) if inside else link

    prompt = deepcopy(prompt)
    for node in prompt.values():
        node["inputs"] = {
            key: source(value) if isinstance(value, list) else value for key, value in node["inputs"].items()
        }
    return prompt


def node_of(prompt: dict[str, Any], *kinds: str) -> str:
    (key,) = (key for key, node in prompt.items() if node["class_type"] in kinds)
    return key


def picture_of(server: ComfyServer, prompt: dict[str, Any]) -> tuple[np.ndarray, Run]:
    """The saved picture, from a run without a traceback in the log."""
    mark = len(server.log)
    run = server.run(prompt)
    assert "Traceback" not in server.log[mark:], server.tail()
    (picture,) = server.pictures(run, node_of(prompt, "FeedFaceSaveImage"))
    return picture.astype(int), run


@every_stable_diffusion
def test_workflow_makes_a_picture_with_the_face(server: ComfyServer, photos: list[str], path: Path) -> None:
    prompt = scaled_down(path, photos)
    face, run = picture_of(server, prompt)
    assert face.shape == (64, 96, 3) and face.std() > 5 and len(np.unique(face)) > 50
    sampler = node_of(prompt, "KSampler", "SamplerCustomAdvanced")
    assert sampler in run.executed and (sampler, 2, 2) in run.progress

    off = prompt
    for kind in ("FeedFaceApply", "FeedFaceSetFace"):
        off = changed(off, kind, strength=0.0)
    plain, _ = picture_of(server, off)
    assert np.abs(face - plain).mean() > 1, "the face changes nothing"
    bypass = {"FeedFaceApply": "model", "FeedFaceSetFace": "conditioning"}
    bypassed, _ = picture_of(server, without_nodes(prompt, bypass))
    assert np.array_equal(plain, bypassed), "strength 0 is not the model without a face"


def test_saved_face_makes_the_same_picture(server: ComfyServer, photos: list[str]) -> None:
    prompt = scaled_down(FOLDER / "feedface_references.json", photos)
    face, name = [node_of(prompt, "FeedFaceEncodeFaces"), 0], f"someone{server.address.rpartition(':')[2]}"
    save = {"face": face, "name": f"people/{name}", "overwrite": False}
    prompt["save"] = {"class_type": "FeedFaceSaveFace", "inputs": save}
    encoded, run = picture_of(server, prompt)
    assert run.outputs[node_of(prompt, "FeedFaceSaveFace")]["text"] == [f"3 references saved as {name}.safetensors"]
    known = server.object_info()["FeedFaceLoadFace"]["input"]["required"]["face_name"]
    files = known[0] if isinstance(known[0], list) else known[1]["options"]
    (file,) = (one for one in files if name in one)
    prompt["face"] = {"class_type": "FeedFaceLoadFace", "inputs": {"face_name": file}}
    prompt = changed(prompt, "FeedFaceApply", face=["face", 0])
    prompt.pop(node_of(prompt, "FeedFaceSaveFace"))
    loaded, run = picture_of(server, prompt)
    assert "face" in run.executed and np.array_equal(encoded, loaded)


def test_weights_of_references_act(server: ComfyServer, photos: list[str]) -> None:
    prompt = scaled_down(FOLDER / "feedface_references.json", photos)
    pictures = [
        picture_of(server, changed(prompt, "FeedFaceEncodeFaces", weights=weights))[0]
        for weights in ("1, 1, 0.5", "1, 1, 0")
    ]
    assert not np.array_equal(*pictures)
    two = changed(prompt, "FeedFaceEncodeFaces", weights="1, 1")
    two[node_of(two, "FeedFaceEncodeFaces")]["inputs"].pop("crops_3")
    # Weight 0 is a photo left out, but for the rounding of an attention over fewer tokens.
    assert np.abs(pictures[1] - picture_of(server, two)[0]).max() <= 2


def test_each_face_stays_in_its_half(server: ComfyServer, photos: list[str]) -> None:
    """One step, so that nothing spreads from one half to the other over the scene's prompt."""
    prompt = changed(scaled_down(FOLDER / "feedface_two_people.json", photos), "KSampler", steps=1)
    prompt = changed(prompt, "EmptyLatentImage", width=128)
    both, _ = picture_of(server, prompt)
    titles = {node["_meta"]["title"]: key for key, node in prompt.items()}
    for title, own, other in (
        ("Left half: Set Face", slice(0, 56), slice(72, 128)),
        ("Right half: Set Face", slice(72, 128), slice(0, 56)),
    ):
        alone = deepcopy(prompt)
        alone[titles[title]]["inputs"]["strength"] = 0.0
        apart = np.abs(picture_of(server, alone)[0] - both)
        assert apart[:, own].mean() > 5 * apart[:, other].mean() and apart[:, own].mean() > 1, title


def test_photographs_of_people(server: ComfyServer, shared_faces: Path) -> None:
    """Several photos of one person, and two people, as they come from a camera."""
    people: dict[str, list[Path]] = {}
    for photo in sorted(shared_faces.glob("*_*.jpg")):
        people.setdefault(photo.stem.split("_")[0], []).append(photo)
    first, second, *_ = people.values()
    for graph, files in (("references", first[:3]), ("two_people", [first[0], second[0]])):
        prompt = scaled_down(FOLDER / f"feedface_{graph}.json", [server.upload(file) for file in files])
        picture, run = picture_of(server, prompt)
        assert picture.std() > 5
        reports = [
            run.outputs[key]["text"][0] for key, node in prompt.items() if node["class_type"] == "FeedFaceDetectFaces"
        ]
        assert len(reports) == len(files) and all("taken: 0 (" in report for report in reports)


def test_missing_adapter_or_face_is_refused_with_the_folders(server: ComfyServer, photos: list[str]) -> None:
    def refused(prompt: dict[str, Any], kind: str) -> str:
        """The one thing that the server says about a node; it still runs the outputs that do not need it."""
        body = {"prompt": prompt, "client_id": server.client_id}
        answer = server.session.post(f"{server.address}/prompt", json=body).json()  # status 400 when no output is left
        (error,) = answer["node_errors"][node_of(prompt, kind)]["errors"]
        return error["details"]

    prompt = scaled_down(FOLDER / "feedface_portrait.json", photos)
    said = refused(changed(prompt, "FeedFaceLoadAdapter", adapter_name="absent.safetensors"), "FeedFaceLoadAdapter")
    assert "no file 'absent.safetensors'; looked in " in said and "feedface" in said
    prompt["face"] = {"class_type": "FeedFaceLoadFace", "inputs": {"face_name": "absent.safetensors"}}
    said = refused(changed(prompt, "FeedFaceApply", face=["face", 0]), "FeedFaceLoadFace")
    assert "no file 'absent.safetensors'; looked in " in said and "faces" in said
