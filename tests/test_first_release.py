"""What users have on their disks from the first release still works: graphs, API files, an adapter, a saved face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from feedface_core.conditioning import combine_references
from feedface_core.files.adapter_file import load_adapter
from feedface_core.files.face_file import load_face
from feedface_core.modules.encoder import build_encoder, encode
from tools.server import ComfyServer
from tools.workflow_format import problems, to_api

FOLDER = Path(__file__).parent / "data" / "first_release"
GRAPHS = sorted(path for path in (FOLDER / "workflows").glob("*.json") if not path.stem.endswith("_api"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_saved_graphs_open(server: ComfyServer, path: Path) -> None:
    """Every node, socket and widget of them is still there, and each widget gets the value it was saved with."""
    object_info, before = server.object_info(), read(path.with_stem(f"{path.stem}_api"))
    opened = to_api(read(path), object_info)
    for prompt in (opened, before):
        for node in prompt.values():
            node.pop("_meta")  # titles, which nothing depends on
    assert opened == before
    assert problems(before, object_info) == []


def test_adapter_and_face_give_the_same_numbers() -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    file, face = load_adapter(FOLDER / "adapter.safetensors"), load_face(FOLDER / "face.safetensors")
    assert (file.config.title, file.config.combination, face.weights) == ("Of old", "average", (1.0, 0.5))
    assert face.encoder == file.config.encoder.fingerprint
    encoder = build_encoder(file.config.encoder, file.encoder_tensors)
    crops = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(encode(encoder, file.config.encoder, crops), expected["hidden"])
    torch.testing.assert_close(face.hidden, expected["hidden"])
    adapter = file.build(torch.float32)
    hidden, bias = combine_references(face.hidden, [2], face.combination, face.weights)
    control = adapter.control(adapter.project(hidden), bias)
    for index, branch in enumerate(adapter.branches):
        added = branch(expected["x"], control.kv[index], control.bias)
        torch.testing.assert_close(added, expected[f"branch.{index}"])
        assert added.abs().max() > 0.01
