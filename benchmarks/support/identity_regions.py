"""Several people in one picture of the small model, each in a column of the own, judged column by column.

The model was trained on one head in a square. Its U-Net knows no places, so a picture of k squares side by side is
drawn as k scenes that touch; FeedFace Regions says who is in which. A column is judged as pictures of one person are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.support.identity_rows import Row
from examples.small_model.evaluate import REFERENCES, Request, bootstrap, requests
from examples.small_model.people import caption
from feedface_core.conditioning import Face, People, latent_masks
from feedface_core.faces.regions import column_masks
from trainer.models.precision import cpu_autocast
from trainer.training.sampling import sample

if TYPE_CHECKING:
    from benchmarks.identity import Bench

ALONE = 2  # of so many people each is drawn alone in the same wide picture as well: what its width costs by itself
ADAPTERS = ("full", "several")
COUNTS = (1, 2, 4)  # people in a picture; one, drawn alone with the same captions, is what the others are held against


@torch.no_grad()
def draw_side_by_side(bench: Bench, row: Row, group: Sequence[Request], alone: int | None = None) -> Tensor:
    """The columns ``(k, 3, S, S)`` in −1…1 of one picture of k people, with the caption and noise of the first; of
    those only the one numbered ``alone`` has its face, if that is given."""
    model, drawn = bench.model, bench.people(row.people)
    size, count, frozen = model.size, len(group), model.frozen
    hidden = model.references(drawn, [request.person for request in group], REFERENCES)
    strengths = tuple(float(alone in (None, place)) for place in range(count))
    people = People(tuple(Face(own) for own in hidden), column_masks(count, size, size * count), strengths)
    shape = (1, *frozen.latent_shape(size, size * count))
    regions = latent_masks(people.masks, torch.zeros(shape))
    with cpu_autocast():
        face = model.adapter.control_of(people, "cpu", torch.float32, regions=regions)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(group[0].seed))
        text = frozen.encode_text([caption(group[0].scene)])
        latents = sample(frozen, noise, text, row.guidance, face, steps=bench.steps)
    return torch.stack(frozen.decode(latents)[0].split(size, dim=-1))


def measure_regions(bench: Bench) -> list[dict[str, Any]]:
    """For each of :data:`ADAPTERS` and :data:`COUNTS` how often the people are told, and taken for one another;
    intervals over pictures.

    With four references of each person and a picture's neighbours by number. ``of_single`` is the share of what the
    full adapter reaches with one person; ``alone`` how often they are told without the others; ``beside`` the
    difference that these make, paired.
    """
    rows = [row for row in (Row("", "", adapter) for adapter in ADAPTERS) if bench.files_of(row)]
    results = [found for row in rows for found in _of_adapter(bench, row)]
    for found in results:
        found["of_single"] = round(found["top1"] / max(results[0]["top1"], 1e-9), 4)
    return results


def _of_adapter(bench: Bench, row: Row) -> list[dict[str, Any]]:
    bench.attach(bench.files_of(row)[0])
    asked, judges = requests(bench.identities, 1), bench.examination(row.people)
    results: list[dict[str, Any]] = []
    for count in COUNTS:
        groups = [asked[first : first + count] for first in range(0, len(asked) - count + 1, count)]
        pictures = torch.cat([draw_side_by_side(bench, row, group) for group in groups])
        shown = [Request(one.person, group[0].scene, one.seed) for group in groups for one in group]
        read = judges.examine(pictures)
        told, picture = read.near.argmax(1).tolist(), np.repeat(np.arange(len(groups)), count)
        others = [{one.person for one in groups[n]} - {one.person} for n, one in zip(picture, shown, strict=True)]
        scores = judges.scores(read, shown)
        scores["confused"] = np.array([float(who in rest) for who, rest in zip(told, others, strict=True)])
        found: dict[str, Any] = {"adapter": row.adapter, "people": count, "pictures": len(groups)}
        for name, values in scores.items():
            found[name] = round(float(values.mean()), 4)
            found[f"{name}_ci"] = [round(value, 4) for value in bootstrap(values, picture)]
        found |= {"alone": None, "beside": None}
        if count == ALONE:
            columns = [draw_side_by_side(bench, row, group, place)[place] for group in groups for place in range(count)]
            own = judges.scores(judges.examine(torch.stack(columns)), shown)["top1"]
            for name, values in (("alone", own), ("beside", scores["top1"] - own)):
                found[name] = round(float(values.mean()), 4)
                found[f"{name}_ci"] = [round(value, 4) for value in bootstrap(values, picture)]
        results.append(found)
    return results
