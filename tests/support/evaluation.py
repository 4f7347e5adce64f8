"""A small evaluation: photos of discs, a small Stable Diffusion and an adapter whose branches do something."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from support.small_training import make_config, make_models, make_photos

from feedface_core.files.adapter_file import save_adapter
from trainer.config import EvaluateSettings
from trainer.models.adapter import load_models


class Small(NamedTuple):
    """Where things are."""

    root: Path
    manifest: Path
    adapter: Path
    base: Path

    def settings(self, output: Path, *overrides: str, **values) -> EvaluateSettings:
        """Four people with two prompts each, at 64 pixels, judged by the adapter's encoder."""
        given = {"people": str(self.manifest), "output": str(output), **values}
        if "pictures" not in given:
            given.setdefault("adapter", str(self.adapter))
        usual = ["detect.detector=whole image", "model.precision=fp32", "sampling.steps=2", "unmodified=3"]
        usual += [] if "pictures" in given else [f"model.base={self.base}"]
        usual += [] if "recogniser" in given else ["recogniser=encoder"]
        named = {one.partition("=")[0] for one in overrides}
        kept = [one for one in usual if one.partition("=")[0] not in named]
        return EvaluateSettings.load(None, [*kept, *overrides], **given)


def make_small(root: Path, **changes) -> Small:
    """Everything that an evaluation reads; ``changes`` are of :func:`~support.small_training.make_config`."""
    models = make_models(root / "models")
    manifest = make_photos(root / "photos", 12, 4)
    lines = manifest.read_text("utf-8").splitlines()
    told = [
        line.replace("a photo of person", f"number {index // 8}, a photo of person") for index, line in enumerate(lines)
    ]
    manifest.write_text("\n".join(told), encoding="utf-8")
    loaded = load_models(make_config(models, manifest, root / "run", **changes), "cpu")
    torch.manual_seed(0)
    for weight in loaded.adapter.parameters():
        if not weight.any():  # begins as the unmodified model
            torch.nn.init.normal_(weight, std=0.2)
    state = loaded.adapter.state_dict()
    metadata = {"modelspec.resolution": "64x64"}
    save_adapter(root / "face.safetensors", loaded.adapter.config, state, loaded.encoder.tensors(), metadata)
    return Small(root, manifest, root / "face.safetensors", models / "base")
