"""The pack as ComfyUI loads it, with small models, adapters and faces."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from support.small_model import CONTEXT, build_model
from torch import Tensor

ENCODER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 56,
    "image_size": 224,
}


@pytest.fixture(scope="session")
def pack(comfy) -> SimpleNamespace:
    """The pack's modules as ComfyUI has them."""
    names = {
        "patches": "nodes.model_patch",
        "apply": "nodes.apply",
        "face": "nodes.encode",
        "guidance": "nodes.guider",
        "loaders": "nodes.load",
        "adapter": "nodes.adapter",
        "folders": "nodes.folders",
        "format": "feedface_core.files.adapter_file",
        "config": "feedface_core.config",
        "conditioning": "feedface_core.conditioning",
        "core_adapter": "feedface_core.modules.adapter",
        "encoder": "feedface_core.modules.encoder",
        "sd_unet": "feedface_core.hosts.sd_unet",
        "site": "feedface_core.hosts.site",
        "core_guidance": "feedface_core.guidance",
        "arithmetic": "feedface_core.arithmetic",
        "number_nodes": "nodes.arithmetic",
        "background": "nodes.background",
    }
    return SimpleNamespace(**{name: comfy.module(path) for name, path in names.items()})


@pytest.fixture(autouse=True)
def plenty_of_memory(comfy, monkeypatch):
    """ComfyUI splits batches by the memory that is free just then, which changes the last digits of a picture."""
    import comfy.model_management

    def free(device=None, torch_free_too=False):  # the sampler asks for one number, attention for two
        return (10**12, 10**12) if torch_free_too else 10**12

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)


@pytest.fixture
def model(comfy):
    return build_model()


@pytest.fixture(scope="session")
def make_adapter(pack, tmp_path_factory) -> Callable:
    """Writes an adapter for :func:`build_model` and loads it as the node does."""

    def make(zero: bool = False, seed: int = 1, width: int = 1, pooling: str = "none", statistics=None, **fields):
        config = pack.config
        name = f"adapter-{seed}-{zero}-{abs(hash(str(sorted(fields.items()))))}.safetensors"
        path = tmp_path_factory.mktemp("adapters") / name
        encoder = config.EncoderConfig(config=ENCODER, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, pooling=pooling)
        sites = pack.sd_unet.default_sites(build_model().get_model_object("diffusion_model"))
        host = pack.config.AdapterConfig(
            **{"host": "sd_unet", "sites": sites, "context_width": 32, "encoder": encoder, **fields}
        )
        torch.manual_seed(seed)
        adapter = pack.core_adapter.FaceAdapter(host)
        for branch in () if zero else [branch for stream in adapter.streams for branch in stream.branches]:
            torch.nn.init.normal_(branch.zero_linear.weight, std=0.1)
        vision = pack.encoder.build_encoder(encoder)
        pack.format.save_adapter(path, host, adapter.state_dict(), vision.state_dict(), statistics=statistics)
        return pack.adapter.LoadedAdapter(str(path))

    return make


@pytest.fixture(scope="session")
def adapter(make_adapter):
    return make_adapter()


@pytest.fixture(scope="session")
def make_mixer(pack, make_adapter) -> Callable:
    """An adapter with a stream of the face and one of the background, both in text tokens or both in branches."""

    def make(text: bool = True, background: bool = True, null: str = "off"):
        encoder = pack.config.EncoderConfig(
            config=ENCODER, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, pooling="class" if text else "none"
        )
        sites = pack.sd_unet.default_sites(build_model().get_model_object("diffusion_model"))
        streams = [
            {"text_tokens": pack.config.TextTokensConfig(count=2, layers=2, width=24, offset=offset), "sites": ()}
            if text
            else {"sites": tuple(sites)}
            for offset in (0, 2)
        ]
        common = {"host": "sd_unet", "context_width": CONTEXT if text else 32, "encoder": encoder, "null": null}
        second = pack.config.AdapterConfig(**common, **streams[1], stream="background") if background else None
        faces = torch.randn(6, 1 if text else encoder.tokens, 48, generator=torch.Generator().manual_seed(8))
        statistics = pack.arithmetic.FaceStatistics.of(faces)
        common = {"context_width": common["context_width"], "null": null, "background": second}
        return make_adapter(pooling=encoder.pooling, statistics=statistics, **common, **streams[0])

    return make


@pytest.fixture(scope="session")
def mixer(make_mixer):
    return make_mixer()


@pytest.fixture(scope="session")
def vae(comfy):
    """ComfyUI's own autoencoder of Stable Diffusion's layout, with few channels and random weights; as nodes load it,
    its weights are of inference mode."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {
        "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.inference_mode():
        torch.manual_seed(0)
        network = AutoencoderKL(ddconfig=config, embed_dim=4)
        weights = {
            name: torch.randn_like(one) * max(one[0].numel(), 1) ** -0.5 + (one.ndim == 1)
            for name, one in network.state_dict().items()
        }
        return comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": config, "embed_dim": 4}}, dtype=torch.float32)


@pytest.fixture(scope="session")
def crops() -> Tensor:
    return torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def face(pack, adapter, crops):
    """A face from one crop."""
    return pack.face.EncodeFaces.execute(adapter, crops[:1]).args[0]


@pytest.fixture(scope="session")
def other_face(pack, adapter, crops):
    return pack.face.EncodeFaces.execute(adapter, crops[1:2]).args[0]


@pytest.fixture
def model_folder(comfy, tmp_path, monkeypatch):
    """An empty ``models/feedface`` that ComfyUI lists."""
    import folder_paths

    folder = tmp_path / "models" / "feedface"
    (folder / "faces").mkdir(parents=True)
    for name, path in (("feedface", folder), ("feedface_faces", folder / "faces"), ("clip_vision", tmp_path / "clip")):
        extensions = folder_paths.folder_names_and_paths[name][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(path)], extensions))
    (tmp_path / "clip").mkdir()
    folder_paths.filename_list_cache.clear()
    return folder


@pytest.fixture(autouse=True)
def no_lists_of_files_that_are_gone() -> Iterator[None]:
    """ComfyUI remembers what lies in its folders, and the folders of a test end with it."""
    yield
    if "folder_paths" in sys.modules:
        sys.modules["folder_paths"].filename_list_cache.clear()
