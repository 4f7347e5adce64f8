"""What ``bench scale`` measures, each in a process of its own: ``python -m benchmarks.support.scale_probes NAME JSON``.

The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from .training_variants import memory


def index(config: str) -> dict[str, float]:
    """Seconds and peak memory of checking a manifest and writing its index."""
    from trainer.config import Config
    from trainer.train import read_records

    values = Config.from_json(config)
    Path(values.train.output).mkdir(parents=True, exist_ok=True)
    idle, began = memory("VmRSS"), time.perf_counter()
    records = read_records(values)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in records.folder.iterdir())
    return {"index_s": seconds, "index_mb": memory("VmHWM") - idle, "index_bytes_a_row": size / len(records)}


def start(config: str) -> dict[str, float]:
    """A training process until its first batch: what ``trainer.train`` does before it makes the optimiser."""
    import psutil

    from trainer import train
    from trainer.config import Config
    from trainer.models.adapter import load_models
    from trainer.training.processes import make_accelerator

    values = Config.from_json(config)
    accelerator = make_accelerator(values.train, values.model.precision, values.optimiser.accumulation)
    began = time.perf_counter()
    records = train.read_records(values)
    rule = train.common_rule(records)
    opened = time.perf_counter() - began
    models = load_models(values, accelerator.device, rule)
    began = time.perf_counter()
    dataset, batches = train.make_batches(values, accelerator, models, records)
    dataset.described()
    opened += time.perf_counter() - began
    found = {"startup_s": time.time() - psutil.Process().create_time(), "rows_ms": 1000 * opened}
    began = time.perf_counter()
    next(batches(0))
    return found | {
        "first_batch_s": time.perf_counter() - began,
        "memory_mb": memory("VmRSS"),
        "peak_mb": memory("VmHWM"),
    }


def checkpoint(folder: str, millions: int) -> dict[str, float]:
    """Seconds of writing a checkpoint of so many million weights with AdamW's state and a moving average."""
    import torch
    from torch import nn

    from trainer.config import TrainSettings
    from trainer.training.processes import make_accelerator
    from trainer.training.state import TrainingState

    settings = TrainSettings(output=folder, batch_size=1, tracker="none", validate_every=None)
    model = nn.ParameterDict({str(n): nn.Parameter(torch.randn(1000, 1000)) for n in range(millions)})
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    for value in model.values():
        value.grad = torch.ones_like(value)
    optimiser.step()
    state = TrainingState(model, [optimiser], 0.999, make_accelerator(settings))
    state.done = 1
    began = time.perf_counter()
    state.write(Path(folder), {}, 1)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"checkpoint_s": seconds, "checkpoint_gb": size / 1e9}


def shards(folder: str, photos: int, samples: int) -> dict[str, float]:
    """Random samples a second, five references each, from shards of the real sizes: Stable Diffusion at 512 pixels and
    ViT-B/32."""
    import numpy as np
    import torch

    from trainer.data.references import Reference
    from trainer.data.shards import FORMAT, PLACES, Folder, ShardedFeatures, shard_name
    from trainer.models.pack import save_shard, write_places

    path, count = Path(folder), 4
    shapes = {"moments": (2, 8, 64, 64), "mask": (2, 1, 64, 64), "hidden": (2, 50, 768), "text.states": (1, 77, 768)}
    for number in range(count):
        tensors = {name: torch.randn(each * photos, *shape) for name, (each, *shape) in shapes.items()}
        tensors["text.states"] = tensors["text.states"].to(torch.bfloat16)
        save_shard(path / shard_name(number), tensors, {}, {"format": FORMAT})
    every = np.arange(count * photos, dtype=np.int32)
    columns = every // photos, every % photos, every % photos, every % photos * 2
    write_places(path / "places.arrow", dict(zip(PLACES, columns, strict=True)))
    features = ShardedFeatures(Folder(folder), path, {"texts": ["text.states"], "made with": {"drawn": {"flip": True}}})
    draw = np.random.default_rng(0)
    began = time.perf_counter()
    for photo in draw.integers(0, len(every), samples).tolist():
        first = photo // photos * photos
        references = [Reference(first + one) for one in draw.integers(0, photos, 5).tolist()]
        features.sample(photo, "a", True, references)
    seconds = time.perf_counter() - began
    size = sum(one.stat().st_size for one in path.glob("shard-*"))
    return {"shard_samples_per_s": samples / seconds, "shard_kb_a_photo": size / len(every) / 1024}


def main(arguments: list[str]) -> None:
    probes: dict[str, Any] = {probe.__name__: probe for probe in (index, start, checkpoint, shards)}
    print(json.dumps(probes[arguments[0]](**json.loads(arguments[1]))))


if __name__ == "__main__":
    main(sys.argv[1:])
