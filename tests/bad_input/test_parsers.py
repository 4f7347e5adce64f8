"""Whatever text goes in: a parser returns something it can stand for, or raises the package's error. Nothing else."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from feedface_core.conditioning import Face
from feedface_core.config import AdapterConfig, EncoderConfig, SiteConfig
from feedface_core.errors import FeedFaceError
from feedface_core.faces.box import check_box, faces_from_json
from feedface_core.faces.select import parse_indexes
from feedface_core.files.face_file import load_face

many = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 10**19, 10**400, 1e308, -1e-320, float("nan"), float("inf")])
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20))
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5)
)
GOOD = AdapterConfig(
    "sd1", (SiteConfig("input_blocks.1.1.transformer_blocks.0", 24, 3, 8),), 16, EncoderConfig({"patch_size": 32})
)


def result_of(call: Any) -> Any:
    """What a parser returns, or None where it refuses."""
    try:
        return call()
    except FeedFaceError as error:
        assert 5 < len(str(error)) < 1500
        return None


@many
@given(st.one_of(st.text(), trees.map(json.dumps)))
def test_config_of_any_text(text: str) -> None:
    assert result_of(lambda: AdapterConfig.from_json(text)) is None


def keys_of(tree: Any, path: tuple = ()) -> list[tuple]:
    """Every path to something inside a tree of lists and dicts."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in pairs for found in [(*path, key), *keys_of(value, (*path, key))]]


@many
@given(st.sampled_from(keys_of(json.loads(GOOD.to_json()))), trees)
def test_config_with_one_value_changed_is_refused_or_kept(path: tuple, value: Any) -> None:
    changed = copy.deepcopy(json.loads(GOOD.to_json()))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    config = result_of(lambda: AdapterConfig.from_json(json.dumps(changed)))
    if config is not None:
        assert AdapterConfig.from_json(config.to_json()) == config
        assert all(
            math.isfinite(value) for value in (config.strength, *config.encoder.image_mean, *config.encoder.image_std)
        )


boxes = st.lists(st.one_of(numbers, leaves), min_size=0, max_size=6)


@many
@given(boxes)
def test_box(box: list) -> None:
    found = result_of(lambda: check_box(box))
    if found is not None:
        x0, y0, x1, y1 = found
        assert all(map(math.isfinite, found)) and x0 < x1 and y0 < y1


@many
@given(st.one_of(st.text(), trees.map(json.dumps), st.lists(boxes, max_size=3).map(json.dumps)), st.integers(1, 3))
def test_boxes_of_photos(text: str, photos: int) -> None:
    found = result_of(lambda: faces_from_json(text, photos))
    if found is not None:
        assert len(found) == photos
        assert all(math.isfinite(value) for faces in found for face in faces for value in face.box)


@many
@given(st.one_of(st.text(), st.lists(st.integers(), max_size=5).map(lambda values: ",".join(map(str, values)))))
def test_indexes(text: str) -> None:
    found = result_of(lambda: parse_indexes(text))
    if found is not None:
        assert found and all(isinstance(index, int) and 0 <= index < 2**31 for index in found)


@many
@given(st.lists(st.one_of(numbers, leaves), min_size=0, max_size=4))
def test_weights_of_a_face(weights: list) -> None:
    face = result_of(lambda: Face(torch.ones(2, 3, 4), tuple(weights)))
    if face is not None:
        assert len(face.weights) == 2 and all(weight >= 0 and math.isfinite(weight) for weight in face.weights)


plain = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=30)


@pytest.mark.parametrize("key", ["format", "format_version", "weights", "combination", "encoder"])
def test_metadata_of_a_saved_face(tmp_path: Path, key: str) -> None:
    metadata = {
        "format": "feedface-face",
        "format_version": "1",
        "weights": "[1, 1]",
        "combination": "concat",
        "encoder": "",
    }

    @settings(max_examples=25, deadline=None)
    @given(st.one_of(plain, trees.map(json.dumps)))
    def check(text: str) -> None:
        path = tmp_path / "face.safetensors"
        save_file({"face.hidden": torch.ones(2, 3, 4)}, path, {**metadata, key: text})
        face = result_of(lambda: load_face(path))
        if face is not None:
            assert all(weight >= 0 and math.isfinite(weight) for weight in face.weights)

    check()
