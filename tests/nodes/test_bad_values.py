"""Every value that can be wired into a node, replaced by ones that no widget gives: refused by node and input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.refused import refused
from support.small_model import prompt

NAN, INF = float("nan"), float("inf")
NO_NUMBER = [NAN, INF, -INF, "text", "", None, [1.0], {}, True, 10**30, -(10**30), 1e308]
#: Python refuses to write them out, so a message that tries to is an error of its own.
LONG = {"5000 digits": 10**5000, "list of 5000 digits": [10**5000]}
NO_CHOICE = ["other", "", None, 3, ["size"]]
NO_TEXT = [None, 3, ["0"]]
NO_PICTURE = {
    "NaN": torch.full((1, 64, 64, 3), NAN),
    "one NaN": torch.zeros(1, 64, 64, 3).index_fill(2, torch.tensor([5]), NAN),
    "infinite": torch.full((1, 64, 64, 3), INF),
    "0 to 255": torch.full((1, 64, 64, 3), 255.0),
    "uint8": torch.full((1, 64, 64, 3), 255, dtype=torch.uint8),
    "flat": torch.zeros(64, 64),
    "no batch": torch.zeros(64, 64, 3),
    "empty batch": torch.zeros(0, 64, 64, 3),
    "no height": torch.zeros(1, 0, 64, 3),
    "five channels": torch.zeros(1, 64, 64, 5),
    "video": torch.zeros(1, 2, 64, 64, 3),
    "none": None,
    "list": [torch.zeros(64, 64, 3)],
    "complex": torch.zeros(1, 64, 64, 3, dtype=torch.complex64),
    "8 bits, NaN": torch.full((1, 64, 64, 3), NAN).to(torch.float8_e4m3fn),
    "without numbers": torch.zeros(1, 64, 64, 3, device="meta"),
    "sparse": torch.zeros(1, 64, 64, 3).to_sparse(),
    "quantised": torch.quantize_per_tensor(torch.zeros(1, 64, 64, 3), 0.1, 0, torch.quint8),
    "different sizes": torch.nested.nested_tensor([torch.zeros(64, 64, 3), torch.zeros(32, 32, 3)]),
}
NO_MASK = {
    "NaN": torch.full((1, 64, 64), NAN),
    "one NaN": torch.ones(1, 64, 64).index_fill(2, torch.tensor([5]), NAN),
    "infinite": torch.full((1, 64, 64), INF),
    "flat": torch.ones(64),
    "four dimensions": torch.ones(1, 64, 64, 3),
    "empty": torch.ones(0, 64, 64),
    "list": [torch.ones(64, 64)],
    "text": "mask",
    "complex": torch.zeros(1, 64, 64, dtype=torch.complex64),
    "without numbers": torch.zeros(1, 64, 64, device="meta"),
    "sparse": torch.zeros(1, 64, 64).to_sparse(),
    "quantised": torch.quantize_per_tensor(torch.zeros(1, 64, 64), 0.1, 0, torch.quint8),
    "different sizes": torch.nested.nested_tensor([torch.zeros(64, 64), torch.zeros(32, 32)]),
}
STATES = torch.zeros(1, 77, 32)
NO_CONDITIONING = {
    "text": "x", "none": None, "number": 5, "dict": {"a": 1}, "tensor": STATES, "numbers": [1], "short": [[STATES]],
    "long": [[STATES, {}, 1]], "no dict": [[STATES, None]], "list for dict": [[STATES, []]], "no states": [["x", {}]],
    "generator": iter([]), "no faces": [[STATES, {"feedface": "x"}]], "list of faces": [[STATES, {"feedface": [1]}]],
}  # fmt: skip
#: Which values an input of each type must refuse.
BAD = {
    "FLOAT": {**dict(zip(map(repr, NO_NUMBER), NO_NUMBER, strict=True)), **LONG},
    "INT": {**dict(zip(map(repr, [*NO_NUMBER, 2.5]), [*NO_NUMBER, 2.5], strict=True)), **LONG},
    "COMBO": {**dict(zip(map(repr, NO_CHOICE), NO_CHOICE, strict=True)), **LONG},
    "STRING": {**dict(zip(map(repr, NO_TEXT), NO_TEXT, strict=True)), **LONG},
    "IMAGE": NO_PICTURE,
    "MASK": NO_MASK,
    "CONDITIONING": NO_CONDITIONING,
}
#: The inputs of each node that are tried, by their types. Names of files are tried elsewhere.
NODES = {
    "detect.DetectFaces": {
        "image": "IMAGE", "detector": "COMBO", "order": "COMBO", "indexes": "STRING", "min_size": "INT",
        "when_none": "COMBO", "crop_scale": "FLOAT", "crop_size": "INT", "boxes": "STRING", "mask": "MASK",
    },
    "encode.EncodeFaces": {
        "crops": "IMAGE", "crops_3": "IMAGE", "weights": "STRING", "combination": "COMBO", "max_references": "INT",
    },
    "encode.CombineFaces": {"share_b": "FLOAT", "combination": "COMBO"},
    "encode.SaveFace": {"name": "STRING", "consent": "STRING"},
    "arithmetic.InterpolateFaces": {"steps": "INT", "first": "FLOAT", "last": "FLOAT", "path": "COMBO"},
    "arithmetic.VaryFace": {"amount": "FLOAT", "seed": "INT"},
    "arithmetic.AddFaceDifference": {"amount": "FLOAT"},
    "arithmetic.RandomFace": {"seed": "INT", "variety": "FLOAT"},
    "background.EncodeBackground": {"image": "IMAGE", "boxes": "STRING", "mask": "MASK"},
    "regions.Regions": {
        "regions": "COMBO", "width": "INT", "height": "INT", "boxes": "STRING", "box_scale": "FLOAT", "masks": "MASK",
    },
    "apply.ApplyFeedFace": {
        "strength": "FLOAT", "start": "FLOAT", "end": "FLOAT", "mask": "MASK", "background_strength": "FLOAT",
    },
    "apply.SetFace": {
        "conditioning": "CONDITIONING", "strength": "FLOAT", "mask": "MASK", "background_strength": "FLOAT",
    },
    "identity_guidance.IdentityGuidanceNode": {
        "scale": "FLOAT", "start": "FLOAT", "end": "FLOAT", "every": "INT", "boxes": "STRING",
    },
    "guider.Guider": {
        "positive": "CONDITIONING", "negative": "CONDITIONING", "text_scale": "FLOAT", "face_scale": "FLOAT",
        "both_scale": "FLOAT", "form": "COMBO",
    },
    "schedule.StrengthSchedule": {
        "curve": "COMBO", "first": "FLOAT", "last": "FLOAT", "points": "STRING", "sites": "STRING",
    },
    "likeness.Score": {"image": "IMAGE", "references": "IMAGE", "recogniser": "COMBO", "detector": "COMBO"},
    "likeness.BestOf": {
        "image": "IMAGE", "references": "IMAGE", "recogniser": "COMBO", "detector": "COMBO", "count": "INT",
        "minimum": "FLOAT", "when_none": "COMBO",
    },
    "unidiffuser.load.UnconditionalText": {"seed": "INT"},
    "save.SaveImage": {
        "images": "IMAGE", "filename_prefix": "STRING", "mark": "COMBO", "format": "COMBO", "quality": "INT",
    },
}  # fmt: skip
#: What these inputs may be although their type says otherwise: nothing connected, or an empty text.
FINE = {("IMAGE", "crops_3", "none"), ("MASK", "mask", "none")}


def cases() -> Iterator[Any]:
    for node, inputs in NODES.items():
        for name, kind in inputs.items():
            for label in BAD[kind]:
                if (kind, name, label) not in FINE:
                    yield pytest.param(node, name, kind, label, id=f"{node.split('.')[-1]}-{name}-{label}")


@pytest.fixture
def good(model, adapter, mixer, face, other_face, crops, vae, model_folder) -> dict[str, dict[str, Any]]:
    """Inputs with which each node works."""
    positive, negative = prompt(1), prompt(2)
    judged = {"recogniser": "adapter's encoder", "detector": "whole image", "adapter": adapter}
    judged |= {"image": crops[:1], "references": crops[1:2]}
    return {
        "detect.DetectFaces": {"image": crops[:1], "boxes": "[[10, 10, 50, 50]]"},
        "encode.EncodeFaces": {"adapter": adapter, "crops": crops[:1]},
        "encode.CombineFaces": {"face_a": face, "face_b": other_face, "share_b": 0.5, "combination": "average"},
        "encode.SaveFace": {"face": face, "name": "ann", "overwrite": False},
        "arithmetic.InterpolateFaces": {"face_a": face, "face_b": other_face, "steps": 3, "first": 0.0, "last": 1.0},
        "arithmetic.VaryFace": {"face": face, "amount": 0.5, "seed": 1},
        "arithmetic.AddFaceDifference": {"face": face, "plus": other_face, "minus": face, "amount": 1.0},
        "arithmetic.RandomFace": {"adapter": mixer, "seed": 1, "variety": 1.0},
        "background.EncodeBackground": {"adapter": mixer, "image": crops[:1], "boxes": "[[10, 10, 50, 50]]"},
        "regions.Regions": {"face_1": face, "face_2": other_face, "regions": "columns", "width": 64, "height": 64},
        "apply.ApplyFeedFace": {
            "model": model, "adapter": adapter, "face": face, "strength": 1.0, "start": 0.0, "end": 1.0,
        },
        "apply.SetFace": {"conditioning": positive, "face": face, "strength": 1.0},
        "identity_guidance.IdentityGuidanceNode": {
            "model": model, "adapter": adapter, "face": face, "vae": vae, "scale": 0.1, "start": 0.0, "end": 1.0,
            "every": 2, "boxes": "[[10, 10, 50, 50]]",
        },
        "guider.Guider": {
            "model": model, "positive": positive, "negative": negative, "text_scale": 5.0, "face_scale": 3.0,
            "form": "three weights",
        },
        "schedule.StrengthSchedule": {"curve": "linear", "first": 0.0, "last": 1.0},
        "likeness.Score": judged,
        "likeness.BestOf": judged,
        "unidiffuser.load.UnconditionalText": {"seed": 1},
        "save.SaveImage": {"images": crops[:1], "filename_prefix": "ann", "mark": "generated"},
    }  # fmt: skip


def node_of(comfy, path: str):
    module, _, name = path.rpartition(".")
    return getattr(comfy.module(f"nodes.{module}"), name)


@pytest.mark.parametrize("path", NODES)
def test_good_values(comfy, good, path: str) -> None:
    node_of(comfy, path).execute(**good[path])


@pytest.mark.parametrize("path", NODES)
def test_every_number_and_picture_is_tried(comfy, path: str) -> None:
    inputs = node_of(comfy, path).define_schema().inputs
    tried = {one.id for one in inputs if one.get_io_type() in BAD}
    assert tried - {"crops_2", "crops_4", "crops_5"} == NODES[path].keys()


@pytest.mark.parametrize(("path", "name", "kind", "label"), list(cases()))
def test_bad_value(comfy, good, path: str, name: str, kind: str, label: str) -> None:
    node = node_of(comfy, path)
    if path == "detect.DetectFaces" and name in ("mask", "detector"):
        good[path].pop("boxes")
    if path == "background.EncodeBackground" and name == "mask":
        good[path]["boxes"] = ""
    error = comfy.module("feedface_core.errors").FeedFaceError
    title = node.define_schema().display_name
    refused(lambda: node.execute(**{**good[path], name: BAD[kind][label]}), title, name, error=error)
