"""What does not grow with the data set, and what two processes are worth.

    python run.py bench scale [--quick] [--rounds 3]

- A training process from its start to its first batch, on manifests of 1,000 to a million rows (``--quick``: 100,000)
  that are made on the spot: a few dozen photos, named by as many rows as it takes, 24 rows a person. Their index is
  made once, by a process of its own, as it is for several processes; then each round is a fresh process.
- A checkpoint of 100 million weights (``--quick``: 10) with AdamW's state and a moving average.
- Samples a second from shards of the real sizes, read at random by one process.
- Two processes with gradients exchanged against two runs beside one another that know nothing of each other, one thread
  each, taking turns; the model is that of ``bench train``. On a machine with two cores, both need both.
- One ComfyUI behind the queue against two of one thread each, taking turns: pictures of the small model.

Every measurement is a process of its own; medians are given. The last line is one JSON object: by rows ``startup_s``
(from the start of the process, imports and models included), ``rows_ms`` (of it, what has to do with the rows),
``first_batch_s`` and ``memory_mb`` (resident, after it), ``index_s``; and ``two_process_efficiency``, ``checkpoint_s``,
``pictures_s_1`` and ``pictures_s_2`` (pictures a second of one server and of two).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tools.options import whole

ROOT = Path(__file__).resolve().parents[1]
ROWS = (1_000, 10_000, 100_000, 1_000_000)
PHOTOS, PERSON = 48, 24
BATCH, STEPS, WARM_UP = 4, 10, 3
PICTURES = 12


def run(module: str, *arguments: str) -> subprocess.Popen:
    """A module in a process of its own, with one thread."""
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **own}
    )


def result(process: subprocess.Popen) -> str:
    """Its output, once it has ended. Exits with its error if it failed."""
    out, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"error: {' '.join(process.args[1:4])} failed:\n{error[-3000:]}")
    return out


def probe(name: str, **values: Any) -> dict[str, float]:
    """One measurement of :mod:`benchmarks.support.scale_probes`."""
    return json.loads(result(run("benchmarks.support.scale_probes", name, json.dumps(values))).splitlines()[-1])


def medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each value."""
    return {name: round(statistics.median(one[name] for one in found), 4) for name in found[0]}


def make_manifest(folder: Path, rows: int) -> Path:
    """So many rows of the photos in a folder, in an order that has nothing to do with people."""
    path = folder / f"{rows}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            person = number * 7919 % rows // PERSON
            row = {"id": f"{number:09d}", "path": f"{number % PHOTOS}.jpg", "mask_path": f"{number % PHOTOS}-mask.png"}
            row |= {"width": 384, "height": 320, "bbox": [100, 60, 220, 180], "identity": f"person {person:07d}"}
            row |= {"caption": f"a photo of a person, number {number}", "photo_hash": f"{number * 2**33 % 2**64:016x}"}
            file.write(json.dumps(row) + "\n")
    return path


def starts(folder: Path, rows: Sequence[int], rounds: int) -> dict[int, dict[str, float]]:
    """What a start costs by number of rows; the sizes take turns."""
    from benchmarks.train import make_photos
    from tools.tiny_diffusers import make_base, make_encoder
    from trainer.config import Config

    make_photos(folder / "photos", PHOTOS)
    make_base(folder / "base")
    make_encoder(folder / "clip", image_size=64)
    configs, found = {}, {}
    for count in rows:
        config = Config.load(
            model={"base": str(folder / "base"), "precision": "fp32"},
            adapter={"encoder": {"path": str(folder / "clip"), "image_size": 64}},
            data={"manifest": str(make_manifest(folder / "photos", count)), "resolution": 128, "workers": 0},
            train={"output": str(folder / f"run-{count}"), "validate_every": None, "tracker": "none", "batch_size": 16},
        )
        configs[count] = config.to_json()
        found[count] = probe("index", config=configs[count])
        print(f"{count:>9} rows: index {found[count]['index_s']:.1f} s", flush=True)
    measured: dict[int, list[dict[str, float]]] = {count: [] for count in rows}
    for _ in range(rounds):
        for count in rows:
            measured[count].append(probe("start", config=configs[count]))
    for count in rows:
        found[count] = {name: round(value, 4) for name, value in found[count].items()} | medians(measured[count])
        own = found[count]
        print(
            f"{count:>9} rows: start {own['startup_s']:.2f} s, of it {own['rows_ms']:.1f} ms for the rows; "
            f"first batch {own['first_batch_s']:.2f} s; {own['memory_mb']:.0f} MB"
        )
    return found


def disk(folder: Path, rounds: int, millions: int) -> dict[str, float]:
    """What writing a checkpoint and reading shards take."""
    saved = [probe("checkpoint", folder=str(folder / f"saved-{n}"), millions=millions) for n in range(rounds)]
    read = []
    for number in range(rounds):
        place = folder / f"shards-{number}"
        place.mkdir()
        read.append(probe("shards", folder=str(place), photos=64, samples=500))
    return medians(saved) | medians(read)


def speed(output: Path) -> float:
    """Samples a second of a run: the median of its steps after the first few."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    found = [line["samples per second"] for line in lines]
    return statistics.median(found[WARM_UP:])


def training(folder: Path, rounds: int) -> dict[str, float]:
    """Samples a second of one run alone, of two side by side, and of two processes of one."""
    from benchmarks.train import make_inputs
    from trainer.config import Config

    folder.mkdir()
    base = Config.load(**json.loads(make_inputs(folder, BATCH, "fp32", 0).read_text()))

    def start(name: str, processes: int) -> tuple[Path, subprocess.Popen]:
        values = base.model_dump(mode="json")
        output = folder / name
        values["train"] |= {"output": str(output), "batch_size": BATCH * processes, "steps": STEPS, "log_every": 1}
        values["train"] |= {"resume": False, "checkpoint_every": 10**6}
        path = folder / f"{name}.json"
        path.write_text(json.dumps(values))
        if processes == 1:
            return output, run("trainer.train", str(path))
        launcher = ["--standalone", "--nproc_per_node", str(processes), "-m", "trainer.train", str(path)]
        return output, run("torch.distributed.run", *launcher)

    found: list[dict[str, float]] = []
    for number in range(rounds):
        speeds = []
        for names in (["alone"], ["first", "second"], ["both"]):
            begun = [start(f"{name}-{number}", 2 if name == "both" else 1) for name in names]
            for _, process in begun:
                result(process)
            speeds.append(sum(speed(output) for output, _ in begun))
        alone, apart, together = speeds
        found.append({"one_process": alone, "two_runs": apart, "two_processes": together})
        found[-1]["two_process_efficiency"] = together / apart
        print(f"samples/s: alone {alone:.2f}, two runs {apart:.2f}, two processes {together:.2f}", flush=True)
    return medians(found)


def queue(folder: Path, rounds: int) -> dict[str, float]:
    """Pictures a second that the queue gets from one ComfyUI, and from two."""
    from tools.server import ComfyServer

    folder.mkdir()
    people = ROOT / "models/feedface_small/people"
    tasks = {"people": [{"id": "one", "photos": [str(people / f"feedface_person1_{n}.png") for n in (1, 2)]}]}
    tasks |= {"prompts": ["a portrait of a person wearing a yellow vest, dotted purple background"]}
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # the servers take them over
    found: list[dict[str, float]] = []
    with ExitStack() as stack:
        servers = [stack.enter_context(ComfyServer(Path(os.environ["COMFYUI_PATH"]))) for _ in range(2)]

        def ask(name: str, seeds: Sequence[int], count: int) -> float:
            (folder / f"{name}.json").write_text(json.dumps({**tasks, "seeds": list(seeds)}))
            line = [str(folder / f"{name}.json"), "--output", str(folder / name)]
            line += ["--workflow", str(ROOT / "workflows/api/feedface_small.json")]
            line += ["--photo-node", "Photo 1.image", "--photo-node", "Photo 2.image"]
            began = time.perf_counter()
            result(run("tools.queue", *line, *(word for one in servers[:count] for word in ("--server", one.address))))
            return time.perf_counter() - began

        ask("warm-up", range(4), 2)  # every server loads the models
        for number in range(rounds):
            seconds = {}
            for count in (1, 2):
                # Less what the command itself takes: the time of many pictures without that of few.
                few = ask(f"few-{number}-{count}", range(2), count)
                many = ask(f"many-{number}-{count}", range(100, 102 + PICTURES), count)
                seconds[count] = many - few
            found.append({f"pictures_s_{count}": PICTURES / took for count, took in seconds.items()})
            print("pictures/s: one server {pictures_s_1:.3f}, two {pictures_s_2:.3f}".format(**found[-1]), flush=True)
    return medians(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py bench scale", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 100,000 rows, a small checkpoint")
    parser.add_argument("--rounds", type=whole(1), default=3, help="fresh processes of each kind (default 3)")
    parser.add_argument("--rows", type=whole(1), nargs="+", help="instead of the default numbers of rows")
    parser.add_argument("--only", choices=["rows", "disk", "training", "queue"], help="a part of it")
    options = parser.parse_args(arguments)
    rows = options.rows or [count for count in ROWS if not options.quick or count <= 100_000]
    wanted = [options.only] if options.only else ["rows", "disk", "training", "queue"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "rows" in wanted:
            found["rows"] = {str(count): own for count, own in starts(Path(folder), rows, options.rounds).items()}
        if "disk" in wanted:
            found |= disk(Path(folder), options.rounds, millions=10 if options.quick else 100)
        if "training" in wanted:
            found |= training(Path(folder) / "training", options.rounds)
        if "queue" in wanted:
            found |= queue(Path(folder) / "queue", options.rounds)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
