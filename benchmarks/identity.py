"""Does the face come through? The published comparisons on the small model: ``python run.py bench identity``.

Draws held-out people with the small model and lets its examiner, which never conditions anything, judge the pictures:

    top1         share told to be the right person, among all held-out people
    similarity   mean-centred cosine to the person's gallery
    prompt       share of the caption's attributes read back from the picture
    background   mean absolute difference (0…1) from the frozen model's picture, outside the heads
    eyes         share with exactly two similar, level eyes, of the pictures without glasses
    frechet      Fréchet distance in the examiner's features from as many drawings of other people
    copied       of the attributes on the face that differ between prompt and first reference, share as in the reference

Rows with "equal colours" in their name are of people redrawn with one skin and one hair colour, galleries included:
what is left is shape. Some rows are drawings: the most that a model could reach, what colour alone tells, and the
ladder, strangers who are given one feature of the person after the other.

Rows whose adapter has not been trained (``python -m examples.small_model.build variants``) are left out and named.
The last line is one JSON object with ``chance`` and ``rows``; each row has ``name``, ``ceiling`` (top-1 of the people's
own drawings through the autoencoder), ``top1``, ``similarity``, ``prompt`` and ``background`` with intervals ``…_ci``
(95 %, bootstrap over people), ``attributes`` (balanced accuracy of each), ``eyes``, ``frechet`` and ``copied``; null
where a row has no such measure. ``differences`` has the same for pairs of rows: they draw the same pictures but for
what the row changes. ``chain`` says where each feature is lost. The report goes to ``--report``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.support import identity_measures as measures
from benchmarks.support.identity_chain import chain
from benchmarks.support.identity_ladder import WITHOUT_COLORS, draw_ladder, rungs
from benchmarks.support.identity_report import MEASURES, interval, write_report
from examples.small_model import system
from examples.small_model.build import WORK
from examples.small_model.drawing import People, draw
from examples.small_model.evaluate import (
    REFERENCES,
    Examination,
    Readings,
    Request,
    SmallModel,
    bootstrap,
    requests,
    wanted_attributes,
)
from feedface_core.guidance import Guidance, joint, text_then_face
from feedface_core.modules.adapter import FaceAdapter
from tools.find_comfyui import ROOT

SCALE = 2.0  # of the joint guidance; ComfyUI's cfg is 3
TRAININGS = 3
GRID = (1.0, 2.0, 3.0, 5.0)
EQUAL = ", equal colours"
LADDER = (*rungs(), WITHOUT_COLORS)
OTHERS = {"heldout": "second", "second": "heldout", "heldout-equal": "second-equal", "second-equal": "heldout-equal"}
"""For each split of test people the one whose drawings its Fréchet distances are from."""
PAIRS = (
    ("4 references", "1 reference"),
    (f"4 references{EQUAL}", f"1 reference{EQUAL}"),
    ("4 references, averaged", "4 references"),
    ("4 references, a detector's box", "4 references, the whole head"),
    ("regularised loss", "standard loss"),
    ("regularised loss", "mask loss"),
    ("retrieval", "no retrieval"),
    ("no self-attention", "full branches"),
    ("every second site", "full branches"),
    ("one a resolution", "full branches"),
)


def without_face(guidance: Guidance) -> Guidance:
    """The same guidance where the face changes nothing, with no prediction computed twice."""
    return Guidance(guidance.dropped + guidance.face, guidance.text + guidance.both, 0.0, 0.0)


PLAIN = without_face(joint(SCALE))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: shown.
        group: rows of one comparison.
        adapter: its variant, or None for the frozen model alone.
        references, combination, crop: how the face is given.
        guidance: how the predictions are combined.
        point: where the row lies in a plot of its group.
        people: split of the test people.
        noise: seeds the noise.
        percent: of the adapter's training.
        trainings: most trainings of the adapter, with other seeds, that the row is the mean of.
        drawing: what is judged instead of the model's pictures: ``drawn`` or ``decoded`` references, ``color``, or the
            name of a rung of the ladder.
    """

    name: str
    group: str
    adapter: str | None = "full"
    references: int = 4
    combination: str = "concat"
    crop: str = "head"
    guidance: Guidance = joint(SCALE)
    point: tuple[float, ...] = ()
    people: str = "heldout"
    noise: int = 0
    percent: int = 100
    trainings: int = 1
    drawing: str | None = None


def all_rows(quick: bool) -> Iterator[Row]:
    """The rows in the order of the table."""
    for split, equal in (("heldout", ""), ("heldout-equal", EQUAL)):
        yield Row(f"no face{equal}", "main", None, 0, guidance=PLAIN, people=split)
        for count in (1, 2, 4):
            name = f"{count} reference{'s' if count > 1 else ''}{equal}"
            yield Row(name, "references", references=count, point=(count,), people=split)
    for split, equal in (("heldout", ""), ("heldout-equal", EQUAL)):
        for name, drawing in (("drawings", "drawn"), ("drawings through the autoencoder", "decoded")):
            yield Row(f"{name}{equal}", "drawings", None, 0, people=split, drawing=drawing)
        yield Row(f"the face's colour alone{equal}", "drawings", None, 0, people=split, drawing="color")
    if quick:
        return
    for rung in LADDER:
        yield Row(f"ladder: {rung}", "ladder", None, 0, drawing=rung)
    for split, equal in (("heldout", ""), ("heldout-equal", EQUAL)):
        other = split.replace("heldout", "second")
        for label, what in (("other noise", {"people": split, "noise": 1}), ("other people", {"people": other})):
            yield Row(f"no face{equal}, {label}", "again", None, 0, guidance=PLAIN, **what)
            yield Row(f"4 references{equal}, {label}", "again", **what)
    for count in (2, 4):
        name = f"{count} references, averaged"
        yield Row(name, "references", references=count, combination="average", point=(count,))
    yield Row("4 references, the whole head", "crops")
    yield Row("4 references, a detector's box", "crops", crop="detector")
    for name, adapter in (("regularised", "full"), ("standard", "standard-loss"), ("mask", "mask-loss")):
        yield Row(f"{name} loss", "losses", adapter, trainings=TRAININGS)
    yield Row("retrieval", "retrieval", trainings=TRAININGS)
    yield Row("no retrieval", "retrieval", "no-retrieval", trainings=TRAININGS)
    yield Row("full branches", "branches", trainings=TRAININGS)
    for name in ("no self-attention", "every second site", "one a resolution"):
        yield Row(name, "branches", name.replace(" ", "-"), trainings=TRAININGS)
    for percent in (25, 50, 100):
        yield Row(f"{percent} % of the training", "training", percent=percent, point=(percent,))
    for text in GRID:
        for face in GRID:
            guidance = text_then_face(text, face)
            yield Row(f"text {text:g}, face {face:g}", "scales", guidance=guidance, point=(text, face))


class Bench:
    """Runs rows; pictures that two of them share are drawn once.

    Args:
        identities, prompts: test people, and pictures of each.
        steps: of the sampler.
        folder: the small model.
        work: of its build: drawn people and adapters.
    """

    def __init__(self, identities: int, prompts: int, steps: int, folder: Path, work: Path):
        self.model = SmallModel(folder)
        self.identities, self.prompts, self.steps = identities, prompts, steps
        self.folder, self.work = folder, work
        self.settings = system.people_settings(folder)
        self._attached: Path | None = None
        self._judged: dict[tuple[Row, int], tuple[Readings, np.ndarray | None]] = {}
        self.people, self.examination = cache(self._people), cache(self._examination)
        self.ladder, self.plain = cache(self._ladder), cache(self.pictures)

    def _people(self, split: str) -> People:
        return People.load(self.work / "people", split)

    def _examination(self, split: str) -> Examination:
        return Examination.of(self.people(split), self.identities, self.folder)

    def _ladder(self, split: str) -> dict[str, torch.Tensor]:
        return draw_ladder(self.settings, split, requests(self.identities, 1), self.work / "people")

    def files_of(self, row: Row) -> list[Path]:
        """The adapter's files, one for each training: the published one and those of the working folder."""
        published, files = self.folder / system.ADAPTER, []
        for training in range(row.trainings):
            name = system.adapter_name(row.adapter, training)
            chosen = (name, row.percent) == ("full", 100) and published.is_file()
            files.append(published if chosen else self.work / "adapters" / f"{name}-{row.percent}.safetensors")
        return [file for file in files if file.is_file()]

    def asked(self, row: Row) -> list[Request]:
        """What a row draws. Drawings of references keep the scenes that they were drawn in."""
        if row.drawing in ("drawn", "decoded"):
            index, records = self.references(row.people), self.people(row.people).records
            return [Request(n // REFERENCES, records[i], 0) for n, i in enumerate(index)]
        return requests(self.identities, self.prompts if row.drawing is None else 1, row.noise)

    def references(self, split: str) -> np.ndarray:
        """Everybody's references, ``(people · REFERENCES,)`` indices."""
        return self.people(split).pictures_of(self.identities)[:, :REFERENCES].ravel()

    def pictures(self, row: Row, training: int = 0) -> torch.Tensor:
        """The pictures of a row, ``(N, 3, S, S)`` in −1…1, from one training of its adapter."""
        people = self.people(row.people)
        if row.drawing in ("drawn", "decoded"):
            pictures = people.pixels(self.references(row.people))
            if row.drawing == "decoded":
                pictures = torch.cat([self.model.reconstruct(chunk) for chunk in pictures.split(50)])
            return pictures
        if row.drawing:
            return self.ladder(row.people)[row.drawing]
        if row.references:
            self._attach(self.files_of(replace(row, trainings=TRAININGS))[training])
        how = (row.references, row.combination, row.crop)
        return self.model.draw(people, self.asked(row), row.guidance, *how, steps=self.steps)

    def judged(self, row: Row, training: int = 0) -> tuple[Readings, np.ndarray | None]:
        """What the judges say of the pictures of a row, and the drift of each where a model drew them."""
        key = replace(row, name="", group="", point=(), trainings=1)
        if (key, training) not in self._judged:
            examination, drift = self.examination(row.people), None
            plain = Row("", "", None, 0, guidance=without_face(row.guidance), people=row.people, noise=row.noise)
            drawn_here = row.references or row.drawing
            pictures = self.pictures(key, training) if drawn_here else self.plain(plain)
            if row.drawing is None:
                drift = examination.drift(pictures, self.plain(plain))
            self._judged[key, training] = examination.examine(pictures), drift
        return self._judged[key, training]

    def scores(self, row: Row) -> dict[str, np.ndarray]:
        """The measures of each picture of a row, ``(trainings, N)``."""
        if row.drawing == "color":
            return {"top1": measures.told_by_color(self.people(row.people), self.identities)[None]}
        found = []
        for training in range(len(self.files_of(row)) if row.adapter else 1):
            read, drift = self.judged(row, training)
            scores = self.examination(row.people).scores(read, self.asked(row))
            found.append(scores if drift is None else scores | {"background": drift})
        return {measure: np.stack([one[measure] for one in found]) for measure in found[0]}

    def _attach(self, file: Path) -> None:
        if file != self._attached:
            self.model.use(file)
            self._attached = file

    def run(self, row: Row) -> dict:
        """One row of the result."""
        summary, cost = self.summary(self.scores(row), self.asked(row)), {}
        if row.adapter:
            files = self.files_of(row)
            self._attach(files[0])
            adapter = self.model.adapter
            count = sum(parameter.numel() for parameter in adapter.parameters())
            cost = {
                "parameters": count,
                "gflop": round(branch_gflop(adapter, row.references, self.model.frozen.host.config), 4),
            }
        described = {"name": row.name, "group": row.group, "point": list(row.point), **cost}
        return {**described, "ceiling": self.ceiling(row.people), **summary, **self.quality(row)}

    def quality(self, row: Row) -> dict:
        """What is measured of all pictures of a row, of the first training, together."""
        nothing = {"attributes": None, "eyes": None, "frechet": None, "copied": None}
        if row.drawing == "color":
            return nothing
        asked, (read, _) = self.asked(row), self.judged(row)
        bare = np.array([request.scene["glasses"] == "none" for request in asked])
        found = nothing | {
            "attributes": measures.by_attribute(read.attributes, wanted_attributes(asked)),
            "eyes": None if read.eyes is None else round(float(read.eyes[bare].mean()), 4),
        }
        others, _ = self.judged(Row("", "", None, 0, people=OTHERS[row.people], drawing="drawn"))
        if len(others.pooled) == len(asked) >= measures.ENOUGH:
            found["frechet"] = round(measures.frechet(read.pooled, others.pooled), 3)
        if row.drawing is None:
            people = self.people(row.people)
            first = people.pictures_of(self.identities)[:, 0]
            references = [people.records[first[request.person]] for request in asked]
            found["copied"] = round(measures.copied(read.attributes, [r.scene for r in asked], references), 4)
        return found

    def summary(self, scores: dict[str, np.ndarray], asked: Sequence[Request]) -> dict:
        """Means and intervals of every measure; None for those that the row does not have."""
        persons, result = np.array([request.person for request in asked]), {}
        for measure in MEASURES:
            values = scores.get(measure)
            result[measure] = None if values is None else round(float(values.mean()), 4)
            interval = None if values is None else [round(value, 4) for value in bootstrap(values, persons)]
            result[f"{measure}_ci"] = interval
        return result

    def differences(self, rows: Sequence[Row]) -> list[dict]:
        """Paired differences of the rows of :data:`PAIRS` that were measured."""
        found, measured = [], {row.name: row for row in rows}
        for one, other in PAIRS:
            if one in measured and other in measured:
                own, theirs = self.scores(measured[one]), self.scores(measured[other])
                both = min(len(own["top1"]), len(theirs["top1"]))
                apart = {measure: own[measure][:both] - theirs[measure][:both] for measure in MEASURES}
                found.append({"name": f"{one} − {other}", **self.summary(apart, self.asked(measured[one]))})
        return found

    def ceiling(self, split: str, drawing: str = "decoded") -> float:
        """Top-1 of the references through the autoencoder, the most that a model could reach, or as ``drawn``."""
        row = Row("", "", None, 0, people=split, drawing=drawing)
        return round(float(self.scores(row)["top1"].mean()), 4)

    def chain(self) -> list[dict]:
        """Where each feature is lost, with one reference; the probes learn from the examiner's people."""
        row, decoded = Row("", "", references=1), Row("", "", None, 0, drawing="decoded")
        (drawn, _), (seen, _) = self.judged(row), self.judged(decoded)
        self._attach(self.files_of(row)[0])
        index = self.references(row.people)
        return chain(
            self.model,
            self.examination(row.people),
            self.people("examiner"),
            self.people(row.people),
            [r.person for r in self.asked(row)],
            drawn,
            index,
            seen,
        )


def branch_gflop(adapter: FaceAdapter, references: int, unet: Mapping[str, Any]) -> float:
    """Operations (2 for a multiply-add, in 10⁹) of all branches for one picture in one step, counted from the shapes.

    ``unet`` is the U-Net's diffusers configuration.

    A branch of width C on N tokens with L face tokens: projections 4·N·C² (self) and 2·N·C² (cross), attention 2·N²·C
    and 2·N·L·C, MLP 12·N·C², last linear N·C². Keys and values of the face are computed once a run and not counted.
    """
    total, face_tokens = 0.0, references * adapter.config.encoder.tokens
    for site in adapter.config.sites:
        n, c = tokens_at(site.name, unet), site.width
        own = 4 * n * c * c + 2 * n * n * c if adapter.config.self_attention else 0
        total += own + 2 * n * c * c + 2 * n * face_tokens * c + 12 * n * c * c + n * c * c
    return 2 * total / 1e9


def tokens_at(name: str, config: Mapping[str, Any]) -> int:
    """Picture tokens at a site of a U-Net with one block a level, from its diffusers configuration."""
    stage, number = name.split(".")[:2]
    lowest = len(config["block_out_channels"]) - 1
    levels = {"input_blocks": (int(number) - 1) // 2, "output_blocks": lowest - int(number) // 2}
    return (config["sample_size"] >> levels.get(stage, lowest)) ** 2


def table(rows: Sequence[dict], chance: float) -> str:
    """The result for people."""
    heads = f"{'top-1':>18}{'ceiling':>9}{'similarity':>12}{'prompt':>9}{'background':>12}{'eyes':>8}{'Fréchet':>9}"
    lines = [f"{'':46}{heads}   (chance {chance:.3f})"]
    columns = {
        "ceiling": "9.3f",
        "similarity": "12.3f",
        "prompt": "9.3f",
        "background": "12.4f",
        "eyes": "8.3f",
        "frechet": "9.2f",
    }
    for row in rows:
        cells = [f"{row['name']:46}{interval(row, 'top1', '{:.3f}', '{:.2f}'):>18}"]
        for name, form in columns.items():
            width = int(form.split(".")[0])
            cells.append(f"{'':{width}}" if row[name] is None else f"{row[name]:{form}}")
        lines.append("".join(cells))
    return "\n".join(lines)


def draw_people(work: Path, folder: Path) -> None:
    """Draws the test people and the examiner's with the settings of a model, unless they are there (needs Node.js)."""
    chosen = system.people_settings(folder)
    absent = [split for split in (*OTHERS, "examiner") if not (work / "people" / split / "manifest.jsonl").is_file()]
    if absent:
        draw(work / "people", chosen, absent, log=say)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py bench identity", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer people and rows, under five minutes")
    parser.add_argument("--identities", type=int, help="held-out people (default 100; quick 40)")
    parser.add_argument("--prompts", type=int, help="pictures of each (default 4; quick 1)")
    parser.add_argument("--steps", type=int, default=16, help="of the sampler (default 16)")
    parser.add_argument("--groups", nargs="+", help="only rows of these groups, such as main references again")
    parser.add_argument("--model", type=Path, default=system.FOLDER, help="the small model")
    parser.add_argument("--work", type=Path, default=WORK, help="where the small model's build keeps its work")
    parser.add_argument("--report", type=Path, help="folder for identity.md and its plots (default docs; quick none)")
    options = parser.parse_args(arguments)
    identities = options.identities or (40 if options.quick else 100)
    prompts = options.prompts or (1 if options.quick else 4)
    draw_people(options.work, options.model)
    bench = Bench(identities, prompts, options.steps, options.model, options.work)
    wanted = [row for row in all_rows(options.quick) if not options.groups or row.group in options.groups]
    rows, results, began = [], [], time.monotonic()
    absent = [row for row in wanted if row.adapter and not bench.files_of(row)]
    for row in wanted:
        if row not in absent:
            rows.append(row)
            results.append(bench.run(row))
            say(f"{time.monotonic() - began:6.0f} s  {row.name}: top-1 {results[-1]['top1']:.3f}")
    result = {
        "chance": 1 / identities,
        "identities": identities,
        "prompts": prompts,
        "steps": options.steps,
        "ceiling": {"drawn": bench.ceiling("heldout", "drawn"), "decoded": bench.ceiling("heldout")},
        "differences": bench.differences(rows),
        "absent": [row.name for row in absent],
        "rows": results,
        "chain": [] if options.quick else bench.chain(),
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
