"""What the trainer saves: a step with and without the cache, against the released trainer's step.

    python run.py bench train                       both compute in bf16 where the processor has it
    python run.py bench train --rounds 9 --batch 8 --threads 8
    python run.py bench train --precision fp32      both in fp32
    python run.py bench train --plain fp32          the released step in fp32, whatever this trainer computes in

The model has Stable Diffusion 1.5's layout (four levels, two blocks each, 16 sites with control branches, a KL
autoencoder, a CLIP text encoder of 12 layers, a ViT with 32-pixel patches over 224-pixel crops) at a fifth of its
width and random weights, on 256-pixel pictures. The autoencoder's widths are such that encoding a picture takes 1.39
times the operations of a forward pass of the U-Net, as it does for the real ones at 512 pixels (1,117 and 803 GFLOP;
here 12.0 and 8.7), so the cache looks no better than it is; two heads make them 32 to 128 wide (real: 40 to 160).

=========  ====================================================================================================
plain      the released trainer's step: photo, caption and face encoded at every step in fp32, the frozen model's
           prediction computed always, its weights requiring gradients, AdamW as it comes, three reads from the device
uncached   this trainer without a cache
cached     this trainer with a cache: the whole loop, with reading, clipping and logging
bare       forward, backward and optimiser alone, on batches of the cached run that are already there
=========  ====================================================================================================

The released trainer keeps no moving average, so by default nobody does here; ``--ema`` gives this trainer one.
``shareable`` is what the frozen model's own prediction has in common with the trained pass, as a share of the bare
step: what comes before the first branch could be computed once for both.

Each variant runs in a process of its own; they take turns, and the medians over all rounds are given. Memory is the
peak of a process from its first step on, above what the same process holds with its libraries imported and nothing
loaded. One thread each, unless told otherwise: more would wait for one another wherever other programs run. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.support.training_variants import RESOLUTION, VARIANTS, run_variant
from tools.options import number, whole

Round = dict[str, float]  # seconds and peak of one variant


def make_inputs(folder: Path, batch: int, precision: str, workers: int, ema: float | None = None) -> Path:
    """Photos, models, a cache, and the configuration of the run."""
    from tools.tiny_diffusers import TinySize, make_base, make_encoder
    from trainer.cache import make_cache
    from trainer.config import Config

    widths = {"channels": (64, 128, 256, 256), "context": 128, "autoencoder": (32, 64, 64, 64), "heads": 2}
    size = TinySize(**widths, blocks=2, autoencoder_blocks=2, text_layers=12, image_size=RESOLUTION)
    make_base(folder / "base", "sd1", size)
    make_encoder(folder / "clip", width=128, layers=12, image_size=224)
    make_photos(folder / "photos", 4 * batch)
    config = Config.load(
        model={"base": str(folder / "base"), "precision": precision},
        adapter={"encoder": {"path": str(folder / "clip")}},
        data={
            "manifest": str(folder / "photos/manifest.jsonl"),
            "cache": str(folder / "cache"),
            "resolution": RESOLUTION,
            "references": 1,
            "workers": workers,
        },
        train={
            "output": str(folder / "run"),
            "steps": 10**6,
            "batch_size": batch,
            "ema": ema,
            "checkpoint_every": 10**6,
            "validate_every": None,
            "tracker": "none",
        },
    )
    make_cache(config, progress=False)
    path = folder / "config.json"
    path.write_text(config.to_json())
    return path


def make_photos(folder: Path, count: int) -> None:
    """Random pictures with a disc for a face, their masks, and a manifest."""
    import numpy
    from PIL import Image, ImageDraw

    from trainer.data.manifest import write_rows

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
        row = {"path": f"{index}.jpg", "mask_path": f"{index}-mask.png", "width": 384, "height": 320}
        row |= {"caption": f"a photo of a person, number {index}", "identity": str(index // 2)}
        rows.append(row | {"bbox": box, "square_bbox": box})
    write_rows(folder / "manifest.jsonl", rows)


def measure(config: Path, rounds: int, steps: int, threads: int, mixed: bool) -> dict[str, list[Round]]:
    """Let the variants take turns; the first round warms up and is left out."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    spawn, variants = multiprocessing.get_context("spawn"), {}
    for name in VARIANTS:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=run_variant, args=(name, theirs, config, mixed, steps, threads), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process shows at ours
        variants[name] = process, ours

    def take(name: str, connection: Connection) -> Round:
        try:
            return connection.recv()
        except EOFError:
            process = variants[name][0]
            process.join()
            raise SystemExit(f"bench train: the {name} variant ended with exit code {process.exitcode}") from None

    results: dict[str, list[Round]] = {name: [] for name in VARIANTS}
    try:
        for name, (_, connection) in variants.items():
            take(name, connection)  # it is ready
        for number in range(rounds + 1):
            for name, (_, connection) in variants.items():
                connection.send("go")
                results[name].append(take(name, connection))
            print(f"round {number} of {rounds}" + (" (warm-up)" if not number else ""), file=sys.stderr, flush=True)
    finally:
        for process, _ in variants.values():
            process.kill()
            process.join()
    return {name: found[1:] for name, found in results.items()}


def summary(results: dict[str, list[Round]], samples: int) -> dict[str, float]:
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
    for name, key in (("shareable", "prefix"), ("frozen_pass", "frozen pass")):
        figures[name] = statistics.median(one.get(key, 0.0) / one["seconds"] for one in results["bare"])
    return {name: round(value, 3) for name, value in figures.items()}


def table(results: dict[str, list[Round]], samples: int) -> str:
    """The results for people."""
    lines = [f"{'':<10}{'samples/s':>12}{'slowest':>10}{'fastest':>10}{'peak MB':>10}"]
    for name, found in results.items():
        speeds = [samples / one["seconds"] for one in found]
        peak = max(one["peak"] for one in found)
        lines.append(
            f"{name:<10}{statistics.median(speeds):>12.2f}{min(speeds):>10.2f}{max(speeds):>10.2f}{peak:>10.0f}"
        )
    return "\n".join(lines)


def best_precision() -> str:
    """The faster one on the device that the variants run on."""
    import torch

    from trainer.models.precision import fastest_precision

    return fastest_precision(torch.accelerator.current_accelerator() or "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=whole(1), default=7, help="measured rounds")
    parser.add_argument("--steps", type=whole(1), default=1, help="steps of each variant in a round")
    parser.add_argument("--batch", type=whole(1), default=4)
    parser.add_argument("--threads", type=whole(1, 1024), default=1, help="threads of each variant")
    parser.add_argument("--workers", type=whole(0, 1024), default=0, help="loader processes")
    precisions = {"choices": ("auto", "fp32", "bf16"), "default": "auto"}
    parser.add_argument("--precision", **precisions, help="of this trainer, and of plain unless --plain says otherwise")
    parser.add_argument("--plain", choices=("same", "fp32"), default="same", help="in what the released step computes")
    parser.add_argument("--ema", type=number(0, 0.999999), help="decay of the moving average (default: none)")
    options = parser.parse_args()
    precision = best_precision() if options.precision == "auto" else options.precision
    mixed = options.plain == "same" and precision == "bf16"
    with tempfile.TemporaryDirectory(prefix="feedface-bench-") as folder:
        config = make_inputs(Path(folder), options.batch, precision, options.workers, options.ema)
        results = measure(config, options.rounds, options.steps, options.threads, mixed)
    samples = options.batch * options.steps
    figures, plain = summary(results, samples), "bf16 autocast" if mixed else "fp32"
    print(f"\nStable Diffusion 1.5's layout at a fifth of its width, {RESOLUTION} pixels, batch {options.batch},")
    print(f"{precision} (plain: {plain}), {options.threads} thread(s); medians of {options.rounds} rounds")
    print(table(results, samples))
    print(
        f"cached over plain: {figures['speedup']:.2f} × the samples, {figures['memory_ratio']:.2f} × the memory; "
        f"cached step over bare step: {figures['step_over_bare']:.3f}\n"
        f"of the bare step, the frozen model's own prediction takes {figures['frozen_pass']:.1%}, and sharing its "
        f"beginning with the trained pass could save {figures['shareable']:.1%}"
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
