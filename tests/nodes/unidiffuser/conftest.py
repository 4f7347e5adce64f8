"""UniDiffuser at the size of the golden numbers, as ComfyUI loads it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.unidiffuser import GOLDEN, text
from torch import Tensor


@pytest.fixture(scope="session")
def uni(comfy) -> SimpleNamespace:
    names = {
        "model": "nodes.unidiffuser.model",
        "joint": "nodes.unidiffuser.joint",
        "nodes": "nodes.unidiffuser.load",
        "adapter": "nodes.adapter",
        "apply": "nodes.apply",
        "face": "nodes.encode",
        "conditioning": "feedface_core.conditioning",
        "encoder": "feedface_core.modules.encoder",
        "uvit": "feedface_core.modules.uvit",
        "hooks": "feedface_core.hosts.hooks",
        "uvit_config": "feedface_core.modules.uvit_config",
    }
    return SimpleNamespace(**{name: comfy.module(path) for name, path in names.items()})


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture
def model(uni):
    return uni.model.load_unidiffuser(GOLDEN / "uvit.pth", GOLDEN / "caption_decoder.pth", torch.float32)


@pytest.fixture(scope="session")
def adapter(uni):
    return uni.adapter.LoadedAdapter(str(GOLDEN / "feed.pt"))


@pytest.fixture
def prompts(golden) -> tuple[list, list]:
    return text(golden, 0), text(golden, 1)
