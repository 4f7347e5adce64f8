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
own drawings through the autoencoder), ``top1``, ``similarity``, ``prompt``, ``background`` and ``eyes`` with intervals
``…_ci`` (95 %, bootstrap over people), ``attributes`` (balanced accuracy of each), ``frechet`` and ``copied``; null
where a row has no such measure. ``differences`` has the same for pairs of rows: they draw the same pictures but for
what the row changes. ``chain`` says where each feature is lost. The report goes to ``--report``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.support import identity_measures as measures
from benchmarks.support.identity_chain import chain
from benchmarks.support.identity_ladder import draw_ladder, draw_people
from benchmarks.support.identity_options import check_options
from benchmarks.support.identity_pull import pulling
from benchmarks.support.identity_regions import measure_regions
from benchmarks.support.identity_report import MEASURES, text_table, write_report
from benchmarks.support.identity_rows import OTHERS, TRAININGS, Row, all_rows, pairs_of, site_rows, without_face
from examples.small_model import system
from examples.small_model.build import WORK
from examples.small_model.drawing import People
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
from tools.options import whole
from trainer.errors import exit_code


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
        files = []
        for training in range(row.trainings):
            name = system.adapter_name(row.adapter, training)
            published = self.folder / system.PUBLISHED.get(name, "")
            chosen = row.percent == 100 and published.is_file()
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
            self.attach(self.files_of(replace(row, trainings=TRAININGS))[training])
        how, change = (row.references, row.combination, row.crop), None
        if row.pull:
            change = partial(pulling, self.model, self.examination(row.people), scale=row.pull, steps=self.steps)
        with self.model.without(row.without):
            return self.model.draw(people, self.asked(row), row.guidance, *how, steps=self.steps, change_clean=change)

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

    def sites(self) -> list[str]:
        """Names of the blocks at which the full adapter has branches."""
        self.attach(self.files_of(Row("", ""))[0])
        return [site.name for site in self.model.adapter.config.sites]

    def attach(self, file: Path) -> None:
        """Gives the model the adapter of a file."""
        if file != self._attached:
            self.model.use(file)
            self._attached = file

    def run(self, row: Row) -> dict:
        """One row of the result."""
        summary, cost = self.summary(self.scores(row), self.asked(row)), {}
        if row.adapter:
            files = self.files_of(row)
            self.attach(files[0])
            adapter = self.model.adapter
            count = sum(parameter.numel() for parameter in adapter.parameters())
            cost = {
                "parameters": count,
                "gflop": round(measures.branch_gflop(adapter, row.references, self.model.frozen.host.config), 4),
            }
        described = {"name": row.name, "group": row.group, "point": list(row.point), **cost}
        return {**described, "ceiling": self.ceiling(row.people), **summary, **self.quality(row)}

    def quality(self, row: Row) -> dict:
        """What is measured of all pictures of a row, of the first training, together."""
        nothing = dict.fromkeys(("attributes", "eyes", "eyes_ci", "frechet", "copied"))
        if row.drawing == "color":
            return nothing
        asked, (read, _) = self.asked(row), self.judged(row)
        bare = np.array([request.scene["glasses"] == "none" for request in asked])
        found = nothing | {"attributes": measures.by_attribute(read.attributes, wanted_attributes(asked))}
        if read.eyes is not None:
            persons, eyes = np.array([request.person for request in asked])[bare], read.eyes[bare]
            found["eyes"] = round(float(eyes.mean()), 4)
            found["eyes_ci"] = [round(value, 4) for value in bootstrap(eyes, persons)]
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
        """Paired differences of those rows that were measured."""
        found, measured = [], {row.name: row for row in rows}
        for one, other in pairs_of(rows):
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
        self.attach(self.files_of(row)[0])
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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py bench identity", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer people and rows, under five minutes")
    parser.add_argument("--identities", type=whole(1), help="held-out people (default 100; quick 40)")
    parser.add_argument("--prompts", type=whole(1), help="pictures of each (default 4; quick 1)")
    parser.add_argument("--steps", type=whole(1), default=16, help="of the sampler (default 16)")
    parser.add_argument("--groups", nargs="+", help="only these, such as main references again regions chain")
    parser.add_argument("--model", type=Path, default=system.FOLDER, help="the small model")
    parser.add_argument("--work", type=Path, default=WORK, help="where the small model's build keeps its work")
    parser.add_argument("--report", type=Path, help="folder for identity.md and its plots (default docs; quick none)")
    options = parser.parse_args(arguments)
    check_options(options)
    identities = options.identities or (40 if options.quick else 100)
    prompts = options.prompts or (1 if options.quick else 4)
    asked = set(options.groups or (() if options.quick else ("chain", "regions")))
    draw_people(options.work, options.model, (*OTHERS, "examiner") if "chain" in asked else tuple(OTHERS), say)
    bench = Bench(identities, prompts, options.steps, options.model, options.work)
    known = [*all_rows(options.quick), *(() if options.quick else site_rows(bench.sites()))]
    wanted = [row for row in known if not options.groups or row.group in options.groups]
    absent = [row for row in wanted if row.adapter and not bench.files_of(row)]
    rows, results, began = [row for row in wanted if row not in absent], [], time.monotonic()
    for row in rows:
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
        "chain": bench.chain() if "chain" in asked else [],
        "regions": measure_regions(bench) if "regions" in asked else [],
        "seconds": round(time.monotonic() - began),
    }
    print(text_table(results, result["chance"]))
    if absent:
        names = ", ".join(result["absent"])
        print(f"not trained here, so left out: {names} (python -m examples.small_model.build variants)")
    if options.report:
        print(f"report: {write_report(result, options.report)}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
