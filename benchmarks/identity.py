"""Does the face come through? The published comparisons on the small model: ``python run.py bench identity``.

Draws held-out people with the small model and lets its examiner, which never conditions anything, judge the pictures:

    top1         share told to be the right person, among all held-out people
    similarity   mean-centred cosine to the person's gallery
    prompt       share of the caption's attributes read back from the picture
    background   mean absolute difference (0…1) from the frozen model's picture, outside the heads

Rows whose adapter has not been trained (``python -m examples.small_model.build variants``) are left out and named.
The last line is one JSON object with ``chance`` and ``rows``; each row has ``name``, ``top1``, ``top1_ci``,
``similarity``, ``prompt`` and ``background`` with intervals ``…_ci`` (95 %, bootstrap over people). ``differences`` has
the same for pairs of rows: they draw the same pictures but for what the row changes. The report goes to ``--report``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.support.identity_report import MEASURES, interval, write_report
from examples.small_model import settings, system
from examples.small_model.build import WORK
from examples.small_model.drawing import People, draw
from examples.small_model.evaluate import REFERENCES, Examination, SmallModel, bootstrap, requests
from feedface_core.guidance import Guidance, joint, text_then_face
from tools.find_comfyui import ROOT

SCALE = 2.0  # of the joint guidance; ComfyUI's cfg is 3
GRID = (1.0, 2.0, 3.0, 5.0)
PAIRS = (
    ("4 references", "1 reference"),
    ("4 references, averaged", "4 references"),
    ("4 references, a detector's box", "4 references, the whole head"),
    ("regularised loss", "standard loss"),
    ("regularised loss", "mask loss"),
    ("retrieval", "no retrieval"),
    ("no self-attention", "full branches"),
    ("every second site", "full branches"),
    ("one a resolution", "full branches"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: shown.
        group: rows of one comparison.
        adapter: name of the adapter's file without suffix, or None for the frozen model alone.
        references, combination, crop: how the face is given.
        guidance: how the predictions are combined.
        point: where the row lies in a plot of its group.
    """

    name: str
    group: str
    adapter: str | None = "full-100"
    references: int = 4
    combination: str = "concat"
    crop: str = "head"
    guidance: Guidance = joint(SCALE)
    point: tuple[float, ...] = ()


def all_rows(quick: bool) -> Iterator[Row]:
    """The rows in the order of the table."""
    yield Row("no face", "main", None, 0)
    for count in (1, 2, 4):
        yield Row(f"{count} reference{'s' if count > 1 else ''}", "references", references=count, point=(count,))
    if quick:
        return
    for count in (2, 4):
        name = f"{count} references, averaged"
        yield Row(name, "references", references=count, combination="average", point=(count,))
    yield Row("4 references, the whole head", "crops")
    yield Row("4 references, a detector's box", "crops", crop="detector")
    for name, adapter in (("regularised", "full"), ("standard", "standard-loss"), ("mask", "mask-loss")):
        yield Row(f"{name} loss", "losses", f"{adapter}-100")
    yield Row("retrieval", "retrieval")
    yield Row("no retrieval", "retrieval", "no-retrieval-100")
    yield Row("full branches", "branches")
    for name in ("no self-attention", "every second site", "one a resolution"):
        yield Row(name, "branches", f"{name.replace(' ', '-')}-100")
    for percent in (25, 50, 100):
        yield Row(f"{percent} % of the training", "training", f"full-{percent}", point=(percent,))
    for text in GRID:
        for face in GRID:
            guidance = text_then_face(text, face)
            yield Row(f"text {text:g}, face {face:g}", "scales", guidance=guidance, point=(text, face))


class Bench:
    """Runs rows; pictures that two of them share are drawn once."""

    def __init__(self, identities: int, prompts: int, steps: int, folder: Path, adapters: Path, people: People):
        self.model = SmallModel(people, identities, folder)
        self.examination = Examination.of(people, identities, folder)
        self.asked = requests(identities, prompts)
        self.steps, self.folder, self.adapters = steps, folder, adapters
        self._attached: str | None = None
        self._plain: dict[Guidance, torch.Tensor] = {}
        self._scores: dict[tuple, dict[str, np.ndarray]] = {}  # a value for each picture

    def file_of(self, name: str) -> Path:
        """The adapter's file: the published one, or one of the working folder."""
        published = self.folder / system.ADAPTER
        return published if name == "full-100" and published.is_file() else self.adapters / f"{name}.safetensors"

    def plain(self, guidance: Guidance) -> torch.Tensor:
        """The frozen model's pictures under the same guidance."""
        guidance = without_face(guidance)
        if guidance not in self._plain:
            self._plain[guidance] = self.model.draw(self.asked, guidance, steps=self.steps)
        return self._plain[guidance]

    def scores(self, row: Row) -> dict[str, np.ndarray]:
        """The measures of each picture of a row."""
        how = (row.references, row.combination, row.crop)
        key = (row.adapter, row.guidance, *how)
        if key not in self._scores:
            pictures = plain = self.plain(row.guidance)
            if row.references:
                self._attach(row.adapter)
                pictures = self.model.draw(self.asked, row.guidance, *how, steps=self.steps)
            self._scores[key] = self.examination.scores(pictures, self.asked, plain)
        return self._scores[key]

    def _attach(self, adapter: str) -> None:
        if adapter != self._attached:
            self.model.use(self.file_of(adapter))
            self._attached = adapter

    def run(self, row: Row) -> dict:
        """One row of the result."""
        summary, cost = self.summary(self.scores(row)), {}
        if row.adapter:
            self._attach(row.adapter)
            adapter = self.model.adapter
            count = sum(parameter.numel() for parameter in adapter.parameters())
            cost = {"parameters": count, "gflop": round(branch_gflop(adapter, row.references), 4)}
        return {"name": row.name, "group": row.group, "point": list(row.point), **cost, **summary}

    def summary(self, scores: dict[str, np.ndarray]) -> dict:
        """Means and intervals of every measure."""
        persons, result = np.array([request.person for request in self.asked]), {}
        for measure in MEASURES:
            result[measure] = round(float(scores[measure].mean()), 4)
            result[f"{measure}_ci"] = [round(value, 4) for value in bootstrap(scores[measure], persons)]
        return result

    def differences(self, rows: Sequence[Row]) -> list[dict]:
        """Paired differences of the rows of :data:`PAIRS` that were measured."""
        found, measured = [], {row.name: row for row in rows}
        for one, other in PAIRS:
            if one in measured and other in measured:
                own, theirs = self.scores(measured[one]), self.scores(measured[other])
                apart = {measure: own[measure] - theirs[measure] for measure in MEASURES}
                found.append({"name": f"{one} − {other}", **self.summary(apart)})
        return found

    def ceiling(self) -> dict[str, float]:
        """What the examiner tells of the references themselves: as they were drawn, and through the autoencoder."""
        index = self.model.people.pictures_of(self.model.identities)[:, :REFERENCES]
        person = torch.arange(len(index)).repeat_interleave(REFERENCES)  # (people · REFERENCES,)
        drawn = self.model.people.pixels(index.ravel())
        decoded = torch.cat([self.model.reconstruct(chunk) for chunk in drawn.split(50)])
        return {
            name: float((self.examination.examine(pictures)[0].argmax(1) == person).float().mean())
            for name, pictures in (("drawn", drawn), ("decoded", decoded))
        }


def without_face(guidance: Guidance) -> Guidance:
    """The same guidance where the face changes nothing, with no prediction computed twice."""
    return Guidance(guidance.dropped + guidance.face, guidance.text + guidance.both, 0.0, 0.0)


def branch_gflop(adapter, references: int) -> float:
    """Operations (2 for a multiply-add, in 10⁹) of all branches for one picture in one step, counted from the shapes.

    A branch of width C on N tokens with L face tokens: projections 4·N·C² (self) and 2·N·C² (cross), attention 2·N²·C
    and 2·N·L·C, MLP 12·N·C², last linear N·C². Keys and values of the face are computed once a run and not counted.
    """
    total, face_tokens = 0.0, references * adapter.config.encoder.tokens
    for site in adapter.config.sites:
        n, c = tokens_at(site.name), site.width
        own = 4 * n * c * c + 2 * n * n * c if adapter.config.self_attention else 0
        total += own + 2 * n * c * c + 2 * n * face_tokens * c + 12 * n * c * c + n * c * c
    return 2 * total / 1e9


def tokens_at(name: str) -> int:
    """Picture tokens at a site of the small U-Net for 64 pixels: 64 on the first level, 16 below it."""
    stage, number = name.split(".")[:2]
    first = {"input_blocks": ("1",), "output_blocks": ("2", "3")}
    return 64 if number in first.get(stage, ()) else 16


def table(rows: Sequence[dict], chance: float) -> str:
    """The result for people."""
    lines = [f"{'':28}{'top-1':>18}{'similarity':>12}{'prompt':>9}{'background':>12}   (chance {chance:.3f})"]
    for row in rows:
        name, top1 = row["name"], interval(row, "top1", "{:.3f}", "{:.2f}")
        lines.append(f"{name:28}{top1:>18}{row['similarity']:>12.3f}{row['prompt']:>9.3f}{row['background']:>12.4f}")
    return "\n".join(lines)


def held_out(work: Path) -> People:
    """The held-out people, drawn when they are not there yet (needs Node.js)."""
    if not (work / "people" / "heldout" / "manifest.jsonl").is_file():
        draw(work / "people", settings.load().people, ["heldout"], log=say)
    return People.load(work / "people", "heldout")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py bench identity", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer people and rows, under five minutes")
    parser.add_argument("--identities", type=int, help="held-out people (default 100; quick 40)")
    parser.add_argument("--prompts", type=int, help="pictures of each (default 4; quick 1)")
    parser.add_argument("--steps", type=int, default=16, help="of the sampler (default 16)")
    parser.add_argument("--model", type=Path, default=system.FOLDER, help="the small model")
    parser.add_argument("--work", type=Path, default=WORK, help="where the small model's build keeps its work")
    parser.add_argument("--report", type=Path, help="folder for identity.md and its plots (default docs; quick none)")
    options = parser.parse_args(arguments)
    identities = options.identities or (40 if options.quick else 100)
    prompts = options.prompts or (1 if options.quick else 4)
    people = held_out(options.work)
    bench = Bench(identities, prompts, options.steps, options.model, options.work / "adapters", people)
    rows, results, began = [], [], time.monotonic()
    absent = [row for row in all_rows(options.quick) if row.adapter and not bench.file_of(row.adapter).is_file()]
    for row in all_rows(options.quick):
        if row not in absent:
            rows.append(row)
            results.append(bench.run(row))
            say(f"{time.monotonic() - began:6.0f} s  {row.name}: top-1 {results[-1]['top1']:.3f}")
    result = {
        "chance": 1 / identities,
        "identities": identities,
        "prompts": prompts,
        "steps": options.steps,
        "ceiling": bench.ceiling(),
        "differences": bench.differences(rows),
        "absent": [row.name for row in absent],
        "rows": results,
        "seconds": round(time.monotonic() - began),
    }
    print(table(results, result["chance"]))
    if absent:
        names = ", ".join(result["absent"])
        print(f"not trained here, so left out: {names} (python -m examples.small_model.build variants)")
    if options.report or not options.quick:
        print(f"report: {write_report(result, options.report or ROOT / 'docs')}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
