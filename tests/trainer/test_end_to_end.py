"""The whole way: photos → prepare → cache → train → export → a picture in ComfyUI that the face has changed."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path

import numpy
import pytest
import yaml
from safetensors.torch import save_file
from support.ldm_layout import autoencoder_to_ldm
from support.small_training import run

from feedface_core.files.adapter_file import load_adapter
from tools.server import ComfyServer
from tools.tiny_checkpoint import checkpoint_weights, write_checkpoint
from tools.tiny_diffusers import make_base, make_encoder

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30

pytestmark = pytest.mark.slow  # two minutes


def command(module: str, *arguments: object) -> str:
    result = run([sys.executable, "-m", module, *map(str, arguments)])
    assert result.returncode == 0, f"{module}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def base_checkpoint(tmp_path_factory) -> Path:
    """The small checkpoint that ComfyUI samples with, with an autoencoder that encodes as well as decodes."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("base")
    weights = {name: value for name, value in checkpoint_weights().items() if not name.startswith("first_stage_model.")}
    autoencoder = AutoencoderKL.from_pretrained(make_base(folder / "parts") / "vae")
    weights |= {f"first_stage_model.{name}": value for name, value in autoencoder_to_ldm(autoencoder).items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "base.safetensors")
    return folder / "base.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, shared_faces, newest_comfyui, base_checkpoint) -> Path:
    """Trained for thirty steps on real photographs, by the four commands."""
    folder = tmp_path_factory.mktemp("whole")
    encoder = make_encoder(folder / "clip", image_size=224)
    photos = folder / "photos"
    photos.mkdir()
    people = sorted({path.name.partition("_")[0] for path in shared_faces.glob("*_*.jpg")})[:2]
    for person in people:
        for photo in sorted(shared_faces.glob(f"{person}_*.jpg"))[:4]:
            (photos / photo.name).symlink_to(photo)
    told = command("trainer.prepare", photos, folder / "dataset", r"identity.pattern=(.+)_\d+", "caption.missing=keep")
    rows = [json.loads(line) for line in (folder / "dataset" / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) >= 5 and {row["identity"] for row in rows} == set(people), told
    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {
                    "base": str(base_checkpoint),
                    "precision": "bf16",
                    "tokenizer": str(newest_comfyui.path / "comfy" / "sd1_tokenizer"),
                },
                "adapter": {"encoder": {"path": str(encoder)}, "title": "Whole way"},
                "data": {
                    "manifest": str(folder / "dataset" / "manifest.jsonl"),
                    "cache": str(folder / "cache"),
                    "resolution": 64,
                    "workers": 0,
                },
                "optimiser": {"lr": 1e-3, "warmup_steps": 5},
                "train": {
                    "output": str(folder / "run"),
                    "steps": STEPS,
                    "batch_size": 4,
                    "ema": 0.9,
                    "checkpoint_every": 15,
                    "log_every": 10,
                    "validate_every": None,
                    "tracker": "none",
                },
            }
        )
    )
    command("trainer.cache", config)
    told = command("trainer.train", config)
    assert f"done at step {STEPS}" in told
    told = command("trainer.export", folder / "run", "-o", folder / "whole_way.safetensors")
    assert "wrote" in told
    return folder / "whole_way.safetensors"


def test_adapter_file(adapter):
    found = load_adapter(adapter)
    assert found.config.host == "sd1" and found.config.title == "Whole way"
    assert found.metadata["training.step"] == str(STEPS)
    assert found.encoder_tensors
    zero_linears = [value for name, value in found.tensors.items() if "zero_linear" in name]
    assert zero_linears and all(value.abs().max() > 0 for value in zero_linears)


def test_picture_in_comfyui(adapter, shared_faces, newest_comfyui, tmp_path):
    models = tmp_path / "models"
    write_checkpoint(models / "checkpoints" / "tiny_sd1.safetensors")
    (models / "feedface").mkdir()
    (models / "feedface" / adapter.name).write_bytes(adapter.read_bytes())
    photo = sorted(shared_faces.glob("*_*.jpg"))[0]
    workflow = json.loads((ROOT / "workflows" / "api" / "feedface_portrait.json").read_text(encoding="utf-8"))
    inputs = {
        entry["class_type"]: entry["inputs"] for entry in workflow.values() if entry["class_type"] != "CLIPTextEncode"
    }
    inputs["CheckpointLoaderSimple"]["ckpt_name"] = "tiny_sd1.safetensors"
    inputs["FeedFaceLoadAdapter"]["adapter_name"] = adapter.name
    inputs["EmptyLatentImage"].update(width=64, height=64)
    inputs["KSampler"].update(steps=3)
    with ComfyServer(newest_comfyui.path, newest_comfyui.python, model_folders=models) as server:
        inputs["LoadImage"]["image"] = server.upload(photo)
        without = deepcopy(workflow)
        next(entry for entry in without.values() if entry["class_type"] == "FeedFaceApply")["inputs"]["strength"] = 0.0
        saved = next(name for name, entry in workflow.items() if entry["class_type"] == "FeedFaceSaveImage")
        (plain,), (faced,) = (server.pictures(server.run(one), saved) for one in (without, workflow))
    difference = numpy.abs(faced.astype(int) - plain.astype(int))
    assert difference.max() >= 3, f"the face changes the picture by at most {difference.max()} of 255"
