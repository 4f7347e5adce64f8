"""Does the face come through? The published comparisons on the small system: ``python run.py bench identity``.

Draws held-out people with the small system and lets its examiner, which never conditions anything, judge the pictures:

    top1         share told to be the right person, among all held-out people
    similarity   mean-centred cosine to the person's gallery
    prompt       share of the caption's attributes read back from the picture
    background   mean absolute difference (0…1) from the frozen model's picture, outside the heads

Rows whose adapter has not been trained (``python -m examples.small_model.build variants``) are left out and named.
The last line is one JSON object with ``chance`` and ``rows``; each row has ``name``, ``top1``, ``top1_ci``,
``similarity``, ``prompt`` and ``background`` with intervals ``…_ci`` (95 %, bootstrap over people). ``differences`` has
the same for
pairs of rows: they draw the same pictures but for what the row changes. The report goes to ``--report``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.support.identity_report import write_report
from examples.small_model import system
from examples.small_model.build import WORK
from examples.small_model.drawing import People
from examples.small_model.evaluate import REFERENCES, Examination, SmallSystem, bootstrap, requests
from examples.small_model.loop import pixels
from feedface_core.guidance import Guidance, joint, text_then_face
from feedface_core.modules.adapter import count_parameters

MEASURES = ("top1", "similarity", "prompt", "background")
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
        references, combination, cut: how the face is given.
        form: how the predictions are combined.
        point: where the row lies in a plot of its group.
    """

    name: str
    group: str
    adapter: str | None = "full-100"
    references: int = 4
    combination: str = "concat"
    cut: str = "head"
    form: Guidance = joint(SCALE)
    point: tuple[float, ...] = ()


def all_rows(quick: bool) -> Iterator[Row]:
    """The rows in the order of the table."""
    yield Row("no face", "main", None, 0)
    for count in (1, 2, 4):
        yield Row(f"{count} reference{'s' if count > 1 else ''}", "references", references=count, point=(count,))
    if quick:
        return
    for count in (2, 4):
        yield Row(
            f"{count} references, averaged", "references", references=count, combination="average", point=(count,)
        )
    yield Row("4 references, the whole head", "crops")
    yield Row("4 references, a detector's box", "crops", cut="detector")
    losses = (("regularised", "full"), ("standard", "standard-loss"), ("mask", "mask-loss"))
    for name, adapter in losses:
        yield Row(f"{name} loss", "losses", f"{adapter}-100")
    yield Row("retrieval", "retrieval")
    yield Row("no retrieval", "retrieval", "no-retrieval-100")
    branches = (
        ("full branches", "full"),
        ("no self-attention", "no-self-attention"),
        ("every second site", "every-second-site"),
        ("one a resolution", "one-a-resolution"),
    )
    for name, adapter in branches:
        yield Row(name, "branches", f"{adapter}-100")
    for part in (25, 50, 100):
        yield Row(f"{part} % of the training", "training", f"full-{part}", point=(part,))
    for text in GRID:
        for face in GRID:
            form = text_then_face(text, face)
            yield Row(f"text {text:g}, face {face:g}", "scales", form=form, point=(text, face))


class Bench:
    """Runs rows, attaching each adapter once in a row of uses."""

    def __init__(self, identities: int, prompts: int, steps: int, folder: Path, adapters: Path, people: People):
        self.system = SmallSystem(people, identities, folder)
        self.examination = Examination(people, identities, folder)
        self.asked = requests(identities, prompts)
        self.steps, self.folder, self.adapters = steps, folder, adapters
        self._attached: str | None = None
        self._plain: dict[Guidance, torch.Tensor] = {}
        self._done: dict[tuple, dict] = {}
        self._scores: dict[str, dict[str, np.ndarray]] = {}  # of each row, a value for each picture
        self._persons = np.array([request.person for request in self.asked])

    def file_of(self, name: str) -> Path:
        """The adapter's file: the published one, or one of the working folder."""
        published = self.folder / system.ADAPTER
        return published if name == "full-100" and published.is_file() else self.adapters / f"{name}.safetensors"

    def plain(self, form: Guidance) -> torch.Tensor:
        """The frozen model's pictures under the same guidance."""
        form = without_face(form)
        if form not in self._plain:
            self._plain[form] = self.system.draw(self.asked, form, steps=self.steps)
        return self._plain[form]

    def run(self, row: Row) -> dict:
        """One row of the result."""
        key = (row.adapter, row.references, row.combination, row.cut, row.form)
        if key in self._done:  # the same pictures under another heading
            done = self._done[key]
            self._scores[row.name] = self._scores[done["name"]]
            return done | {"name": row.name, "group": row.group, "point": list(row.point)}
        cost = {}
        if row.adapter and row.adapter != self._attached:
            self.system.use(self.file_of(row.adapter))
            self._attached = row.adapter
        if row.adapter:
            adapter = self.system.adapter
            cost = {"parameters": count_parameters(adapter), "gflop": round(branch_gflop(adapter, row.references), 4)}
        pictures = self.plain(row.form)
        if row.references:
            pictures = self.system.draw(
                self.asked, row.form, row.references, row.combination, row.cut, steps=self.steps
            )
        scores = self._scores[row.name] = self.examination.scores(pictures, self.asked, self.plain(row.form))
        result = {"name": row.name, "group": row.group, "point": list(row.point), **cost, **self.summary(scores)}
        self._done[key] = result
        return result

    def summary(self, scores: dict[str, np.ndarray]) -> dict:
        """Means and intervals of every measure."""
        result: dict = {}
        for measure in MEASURES:
            result[measure] = round(float(scores[measure].mean()), 4)
            result[f"{measure}_ci"] = [round(v, 4) for v in bootstrap(scores[measure], self._persons)]
        return result

    def differences(self) -> list[dict]:
        """Paired differences of the rows of :data:`PAIRS` that were measured."""
        found = []
        for one, other in PAIRS:
            if one in self._scores and other in self._scores:
                apart = {m: self._scores[one][m] - self._scores[other][m] for m in MEASURES}
                found.append({"name": f"{one} − {other}", **self.summary(apart)})
        return found

    def ceiling(self) -> dict[str, float]:
        """What the examiner tells of the references themselves: as they were drawn, and through the autoencoder."""
        person = torch.arange(self.system.identities).repeat_interleave(REFERENCES)  # (people · REFERENCES,)
        index = person * self.system.per_person + torch.arange(REFERENCES).repeat(self.system.identities)
        drawn = pixels(self.system.people.pictures[index.numpy()])
        decoded = torch.cat([self.system.reconstruct(part) for part in drawn.split(50)])
        shown = {"drawn": drawn, "decoded": decoded}
        return {
            name: float((self.examination.nearness(x).argmax(1) == person).float().mean()) for name, x in shown.items()
        }


def without_face(form: Guidance) -> Guidance:
    """The same guidance where the face changes nothing, with no prediction computed twice."""
    return Guidance(form.dropped + form.face, form.text + form.both, 0.0, 0.0)


def branch_gflop(adapter, references: int) -> float:
    """Operations (2 for a multiply-add, in 10⁹) of all branches for one picture in one step, counted from the shapes.

    A branch of width C on N tokens with L face tokens: projections 4·N·C² (self) and 2·N·C² (cross), attention 2·N²·C
    and 2·N·L·C, MLP 12·N·C², last linear N·C². Keys and values of the face are computed once a run and not counted.
    """
    total = 0.0
    face_tokens = references * adapter.config.encoder.tokens
    for site in adapter.config.sites:
        n, c = tokens_at(site.name), site.width
        own = 4 * n * c * c + 2 * n * n * c if adapter.config.self_attention else 0
        total += own + 2 * n * c * c + 2 * n * face_tokens * c + 12 * n * c * c + n * c * c
    return 2 * total / 1e9


def tokens_at(name: str) -> int:
    """Image tokens at a site of the small U-Net: 64 on the first level, 16 below it."""
    stage, number = name.split(".")[:2]
    first = {"input_blocks": ("1",), "output_blocks": ("2", "3")}
    return 64 if number in first.get(stage, ()) else 16


def table(rows: list[dict], chance: float) -> str:
    """The result for people."""
    lines = [f"{'':28}{'top-1':>18}{'similarity':>12}{'prompt':>9}{'background':>12}   (chance {chance:.3f})"]
    for row in rows:
        low, high = row["top1_ci"]
        told = f"{row['top1']:.3f} [{low:.2f}, {high:.2f}]"
        lines.append(
            f"{row['name']:28}{told:>18}{row['similarity']:>12.3f}{row['prompt']:>9.3f}{row['background']:>12.4f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py bench identity", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer people and rows, under five minutes")
    parser.add_argument("--identities", type=int, help="held-out people (default 100; quick 40)")
    parser.add_argument("--prompts", type=int, help="pictures of each (default 4; quick 1)")
    parser.add_argument("--steps", type=int, default=16, help="of the sampler (default 16)")
    parser.add_argument("--model", type=Path, default=system.FOLDER, help="the small system")
    parser.add_argument("--work", type=Path, default=WORK, help="where the small model's build keeps its work")
    parser.add_argument("--report", type=Path, help="folder for identity.md and its plots (default docs; quick none)")
    options = parser.parse_args(arguments)
    identities = options.identities or (40 if options.quick else 100)
    prompts = options.prompts or (1 if options.quick else 4)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    people = held_out(options.work, say)
    bench = Bench(identities, prompts, options.steps, options.model, options.work / "adapters", people)
    rows, absent, began = [], [], time.monotonic()
    for row in all_rows(options.quick):
        if row.adapter and not bench.file_of(row.adapter).is_file():
            absent.append(row.name)
            continue
        rows.append(bench.run(row))
        say(f"{time.monotonic() - began:6.0f} s  {row.name}: top-1 {rows[-1]['top1']:.3f}")
    result = {
        "chance": 1 / identities,
        "identities": identities,
        "prompts": prompts,
        "steps": options.steps,
        "ceiling": bench.ceiling(),
        "differences": bench.differences(),
        "absent": absent,
        "rows": rows,
        "seconds": round(time.monotonic() - began),
    }
    print(table(rows, result["chance"]))
    if absent:
        print(f"not trained here, so left out: {', '.join(absent)} (python -m examples.small_model.build variants)")
    if options.report or not options.quick:
        print(f"report: {write_report(result, options.report or system.FOLDER.parents[1] / 'docs')}")
    print(json.dumps(result))
    return 0


def held_out(work: Path, say: Callable[[str], None]) -> People:
    """The held-out people, drawn when they are not there yet (needs Node.js)."""
    from examples.small_model.drawing import build
    from examples.small_model.people import PeopleConfig

    if not (work / "people" / "heldout" / "records.jsonl").is_file():
        say("drawing the held-out people")
        build(work / "people", PeopleConfig(), log=say, splits=("heldout",))
    return People.load(work / "people", "heldout")


if __name__ == "__main__":
    raise SystemExit(main())
