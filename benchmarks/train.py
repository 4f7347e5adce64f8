"""What the trainer saves: a training step with and without the cache, against a straightforward one.

    python run.py bench train                       this trainer in bf16 where the processor has it, plain in fp32
    python run.py bench train --rounds 9 --batch 8 --threads 8
    python run.py bench train --mixed               plain, too, computes its U-Net in bf16
    python run.py bench train --precision fp32      all in fp32

The model has Stable Diffusion 1.5's layout (four levels, two blocks each, 16 sites with control branches, a KL
autoencoder, a CLIP text encoder of 12 layers, a ViT with 32-pixel patches over 224-pixel crops) at a fifth of its
width and random weights, on 256-pixel pictures. The autoencoder's widths are such that encoding a picture takes 1.39
times the operations of a forward pass of the U-Net, as it does for the real ones at 512 pixels (1,117 and 803 GFLOP;
here 12.0 and 8.7), so the cache looks no better than it is; two heads make them 32 to 128 wide (real: 40 to 160).

=========  ====================================================================================================
plain      a straightforward step after the published description: photo, caption and face encoded at every step, all
           in fp32, the base's weights requiring gradients, two full forward passes, AdamW as it comes
uncached   this trainer without a cache
cached     this trainer with a cache: the whole loop, with reading, clipping, moving average and logging
bare       forward, backward and optimiser alone, on batches of the cached run that are already there
=========  ====================================================================================================

Each variant runs in a process of its own; they take turns, and the medians over all rounds are given. Memory is the
peak of a process from its first step on, above what the same process holds with its libraries imported and nothing
loaded. One thread each, unless told otherwise: more would wait for one another wherever other programs run. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

VARIANTS = ("plain", "uncached", "cached", "bare")
RESOLUTION = 256
T = TypeVar("T")


# --- one variant, in its own process ---------------------------------------------------------------------


def memory(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process in MB; 0 where the system does not tell."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found.group(1)) / 1024 if found else 0.0
    except OSError:
        return 0.0


def import_libraries() -> None:
    """All that a run imports sooner or later, so that it counts for no variant."""
    import_module = importlib.import_module
    for name in ("trainer.train", "trainer.cache", "trainer.models.stable_diffusion", "trainer.models.diffusers_files"):
        import_module(name)
    for library, names in (
        ("diffusers", ("UNet2DConditionModel", "AutoencoderKL", "DDPMScheduler")),
        ("transformers", ("CLIPTextModel", "CLIPVisionModel", "CLIPTokenizer")),
    ):
        for name in names:  # these libraries import a class when it is asked for
            getattr(import_module(library), name)


def forget_peak() -> None:
    """Give freed memory back and let the peak start from what is held now."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def paced(batches: Iterable[T], steps: int, idle: float) -> Iterator[T]:
    """Hand out batches; after every ``steps`` of them report the time and wait to be told to go on."""
    forget_peak()
    print("ready", flush=True)
    source = iter(batches)
    while sys.stdin.readline().strip() == "go":
        began = time.perf_counter()
        for _ in range(steps):
            yield next(source)
        # The consumer comes back here when the last step of the round is done.
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "peak": memory("VmHWM") - idle}), flush=True)
    os._exit(0)  # no final checkpoint


def run_variant(name: str, path: Path, mixed: bool, steps: int, idle: float) -> None:
    """Train until told to stop."""
    import torch

    from trainer.config import Config
    from trainer.train import be_deterministic, make_accelerator, make_batches, read_records, release_encoders
    from trainer.training.build import build_parts
    from trainer.training.trainer import Trainer

    config = Config.from_json(path.read_text())
    torch.manual_seed(0)
    if name == "plain":
        return run_plain(config, mixed, steps, idle)
    if name == "uncached":
        config = config.model_copy(update={"data": config.data.model_copy(update={"cache": None})})
    output = path.parent / f"run-{name}"
    config = config.model_copy(update={"train": config.train.model_copy(update={"output": str(output)})})
    output.mkdir()
    be_deterministic(config)
    accelerator = make_accelerator(config)
    parts = build_parts(config, accelerator.device)
    _, batches = make_batches(config, accelerator, parts, read_records(config))
    release_encoders(config, parts)
    trainer = Trainer(config, accelerator, parts, lambda start: paced(batches(start), steps, idle))
    if name == "bare":
        return run_bare(trainer, batches(0), steps, idle)
    trainer.run()


def run_bare(trainer, batches, steps: int, idle: float) -> None:
    """Forward, backward and optimiser, and nothing else."""
    from trainer.training.step import encode_batch

    parts, prepared = trainer.parts, []
    for _, batch in zip(range(4 * steps), batches, strict=False):
        plan = trainer._module.plan(batch)
        prepared.append((batch, encode_batch(batch, parts.base, parts.encoder), plan))
    for place in paced(range(10**9), steps, idle):
        batch, features, plan = prepared[place % len(prepared)]
        loss, _ = trainer.step_module(batch, features, plan)
        loss.backward()
        trainer._plain_optimiser.step()
        trainer._plain_optimiser.zero_grad()


def run_plain(config, mixed: bool, steps: int, idle: float) -> None:
    """The published training step as one would write it down."""
    import torch

    from trainer.data.dataset import FaceDataset, TensorShapes, make_loader
    from trainer.data.manifest import read_manifest
    from trainer.data.order import GlobalBatches
    from trainer.training.build import build_parts

    model = config.model.model_copy(update={"precision": "fp32"})
    config = config.model_copy(update={"model": model})
    parts = build_parts(config, "cpu")
    base, encoder, adapter = parts.base, parts.encoder, parts.adapter
    base.host.requires_grad_(True)
    records, _ = read_manifest(config.data.manifest)
    loss = config.loss.model_copy(update={"face_dropout": 0.0, "text_dropout": 0.0})
    dataset = FaceDataset(records, config.model_copy(update={"loss": loss}), TensorShapes.of(base, RESOLUTION))
    order = GlobalBatches(len(records), config.train.batch_size, 0, 10**6)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=2e-5, betas=(0.9, 0.9), weight_decay=0.03)
    for number, batch in enumerate(paced(make_loader(dataset, order, config.data.workers), steps, idle)):
        with torch.no_grad():
            latents = base.sample_latents(base.encode_pixels(batch.pixels), batch.latent_noise)
            text = base.encode_text(batch.captions)
            crops = torch.zeros_like(batch.crops) if number % 10 == 9 else batch.crops
            hidden = encoder.encode(crops)  # (B, T, E), one reference each
        noisy = base.schedule.add_noise(latents, batch.noise, batch.timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            rows = [(len(batch), adapter.control(adapter.project(hidden.float())))]
            with torch.no_grad():
                original = base.predict(noisy, batch.timesteps, text)
            prediction = base.predict(noisy, batch.timesteps, text, rows)
        inside, outside = (batch.noise - prediction).square(), (original - prediction).square()
        value = inside.mean()
        if number % 10 != 4:
            value = (inside * batch.masks).mean() + (outside * (1 - batch.masks)).mean()
        value.backward()
        optimiser.step()
        optimiser.zero_grad()


# --- all of them -----------------------------------------------------------------------------------------


def make_inputs(folder: Path, batch: int, precision: str, workers: int) -> Path:
    """Photos, models, a cache, and the configuration of the run."""
    from tools.tiny_diffusers import TinySize, make_base, make_encoder
    from trainer.cache import make_cache
    from trainer.config import Config

    size = TinySize(
        channels=(64, 128, 256, 256),
        blocks=2,
        context=128,
        autoencoder=(32, 64, 64, 64),
        autoencoder_blocks=2,
        text_layers=12,
        heads=2,
        image_size=RESOLUTION,
    )
    make_base(folder / "base", "sd1", size)
    make_encoder(folder / "clip", width=128, layers=12, image_size=224)
    manifest = make_photos(folder / "photos", 4 * batch)
    config = Config.load(
        model={"base": str(folder / "base"), "precision": precision},
        adapter={"encoder": {"path": str(folder / "clip")}},
        data={
            "manifest": str(manifest),
            "cache": str(folder / "cache"),
            "resolution": RESOLUTION,
            "references": 1,
            "workers": workers,
        },
        train={
            "output": str(folder / "run"),
            "steps": 10**6,
            "batch_size": batch,
            "ema": 0.9999,
            "checkpoint_every": 10**6,
            "validate_every": None,
            "tracker": "none",
        },
    )
    make_cache(config, progress=False)
    path = folder / "config.json"
    path.write_text(config.to_json())
    return path


def make_photos(folder: Path, count: int) -> Path:
    """Random pictures with a disc for a face."""
    import numpy
    from PIL import Image, ImageDraw

    folder.mkdir()
    rows = []
    for index in range(count):
        random = numpy.random.default_rng(index)
        photo = Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=numpy.uint8)).resize((384, 320))
        left, top, side = (int(random.integers(*limits)) for limits in ((60, 160), (20, 100), (80, 150)))
        box = (left, top, left + side, top + side)
        mask = Image.new("L", photo.size, 0)
        ImageDraw.Draw(mask).ellipse(box, fill=231)
        photo.save(folder / f"{index}.jpg")
        mask.save(folder / f"{index}-mask.png")
        rows.append(
            {
                "path": f"{index}.jpg",
                "caption": f"a photo of a person, number {index}",
                "width": 384,
                "height": 320,
                "bbox": box,
                "square_bbox": box,
                "mask_path": f"{index}-mask.png",
                "identity": str(index // 2),
            }
        )
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def measure(path: Path, rounds: int, steps: int, threads: int, mixed: bool) -> dict[str, list[dict[str, float]]]:
    """Let the variants take turns; the first round warms up and is left out."""
    command = [sys.executable, "-m", "benchmarks.train", "--config", str(path), "--steps", str(steps)]
    command += ["--threads", str(threads), *(["--mixed"] if mixed else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    children = {
        name: subprocess.Popen(
            [*command, "--variant", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for name in VARIANTS
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    try:
        for name, child in children.items():
            while (line := child.stdout.readline()) != "ready\n":
                if not line:
                    raise SystemExit(f"bench train: the {name} variant ended with exit code {child.wait()}")
        for number in range(rounds + 1):
            for name, child in children.items():
                child.stdin.write("go\n")
                child.stdin.flush()
                line = child.stdout.readline()
                if not line:
                    raise SystemExit(f"bench train: the {name} variant ended with exit code {child.wait()}")
                results[name].append(json.loads(line))
            print(f"round {number} of {rounds}" + (" (warm-up)" if not number else ""), file=sys.stderr, flush=True)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return {name: found[1:] for name, found in results.items()}


def summary(results: dict[str, list[dict[str, float]]], samples: int) -> dict[str, float]:
    """The figures of the last line."""
    speed = {name: samples / statistics.median(one["seconds"] for one in found) for name, found in results.items()}
    peak = {name: max(one["peak"] for one in found) for name, found in results.items()}
    pairs = zip(results["cached"], results["bare"], strict=True)  # of the same round: what else runs is the same
    figures = {
        "plain_sps": speed["plain"],
        "uncached_sps": speed["uncached"],
        "cached_sps": speed["cached"],
        "bare_sps": speed["bare"],
        "speedup": speed["cached"] / speed["plain"],
        "plain_peak_mb": peak["plain"],
        "uncached_peak_mb": peak["uncached"],
        "cached_peak_mb": peak["cached"],
        "memory_ratio": peak["cached"] / max(peak["plain"], 1e-9),
        "step_over_bare": statistics.median(one["seconds"] / other["seconds"] for one, other in pairs),
    }
    return {name: round(value, 3) for name, value in figures.items()}


def best_precision() -> str:
    """bf16 where the processor computes in it, else fp32."""
    import torch

    if torch.accelerator.is_available():
        return "bf16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps of each variant in a round")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="threads of each variant")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of this trainer's variants; plain is always fp32",
    )
    parser.add_argument("--mixed", action="store_true", help="plain computes its U-Net under bf16 autocast")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        import torch

        import_libraries()
        torch.set_num_threads(options.threads)
        return run_variant(options.variant, options.config, options.mixed, options.steps, memory("VmRSS"))
    precision = best_precision() if options.precision == "auto" else options.precision
    with tempfile.TemporaryDirectory(prefix="feedface-bench-") as folder:
        path = make_inputs(Path(folder), options.batch, precision, options.workers)
        results = measure(path, options.rounds, options.steps, options.threads, options.mixed)
    figures = summary(results, options.batch * options.steps)
    plain = "bf16 autocast" if options.mixed else "fp32"
    print(f"\nStable Diffusion 1.5's layout at a fifth of its width, {RESOLUTION} pixels, batch {options.batch},")
    print(f"{precision} (plain: {plain}), {options.threads} thread(s); medians of {options.rounds} rounds")
    print(f"{'':<10}{'samples/s':>12}{'slowest':>10}{'fastest':>10}{'peak MB':>10}")
    for name, found in results.items():
        speeds = [options.batch * options.steps / one["seconds"] for one in found]
        peak = max(one["peak"] for one in found)
        print(f"{name:<10}{statistics.median(speeds):>12.2f}{min(speeds):>10.2f}{max(speeds):>10.2f}{peak:>10.0f}")
    print(
        f"cached over plain: {figures['speedup']:.2f} × the samples, {figures['memory_ratio']:.2f} × the memory; "
        f"cached step over bare step: {figures['step_over_bare']:.3f}"
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
