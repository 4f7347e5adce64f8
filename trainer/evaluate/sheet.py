"""What there is to look at: a contact sheet of everybody's pictures, and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from feedface_core.files.atomic import replacing

from ..data import pictures
from .measures import FACE, UNMODIFIED, PersonScores

TILE, LINE, GAP = 128, 13, 4
MOST_PEOPLE, MOST_PHOTOS, MOST_PICTURES = 60, 5, 8
INK, PALE, PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)


def contact_sheet(people: Sequence[PersonScores], output: Path) -> Path:
    """``contact_sheet.png``: for each person the photos that the adapter sees, then the first pictures in the order of
    the prompts, none chosen: with the face above, without it in the same noise below."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    shown = people[:MOST_PEOPLE]
    photos = max(min(one.references.used, MOST_PHOTOS) for one in shown)
    kinds = [kind for kind in (FACE, UNMODIFIED) if any(one.of(kind) for one in shown)]
    count = min(max((len(one.of(kind)) for one in shown for kind in kinds), default=0), MOST_PICTURES)
    cell = TILE + GAP
    row = LINE + len(kinds) * (TILE + 2 * LINE) + GAP
    sheet = Image.new("RGB", (GAP + (photos + count) * cell + 2 * GAP, LINE + len(shown) * row), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 2)
    first = GAP + photos * cell + 2 * GAP  # column of the pictures
    draw.text((GAP, 0), "photos", INK, font=font)
    draw.text((first, 0), "pictures: with the face" + (", below without it" * (len(kinds) > 1)), INK, font=font)

    def paste(path: Path, x: int, y: int, below: Sequence[str]) -> None:
        sheet.paste(ImageOps.pad(pictures.open_photo(path), (TILE, TILE), color=(225, 225, 225)), (x, y))
        for number, text in enumerate(below):
            short = text if len(text) < 23 else f"{text[:21]}…"
            draw.text((x, y + TILE + number * LINE), short, (INK, PALE)[number > 0], font=font)

    for number, one in enumerate(shown):
        top = LINE + number * row
        draw.text((GAP, top), one.references.person.name[:60], INK, font=font)
        for place, look in enumerate(one.references.shown[:photos]):
            paste(look.path, GAP + place * cell, top + LINE, [look.path.name])
        for level, kind in enumerate(kinds):
            for place, picture in enumerate(one.of(kind)[:count]):
                value = picture.values["similarity"]
                said = "no face found" if math.isnan(value) else f"similarity {value:.2f}"
                y = top + LINE + level * (TILE + 2 * LINE)
                paste(picture.look.path, first + place * cell, y, [picture.request.prompt, said])
    path = output / "contact_sheet.png"
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")
    return path


def plots(people: Sequence[PersonScores], recogniser: str, output: Path) -> Path | None:
    """``similarity.png``: each person's pictures between the two ends of the scale, and how near the nearest photo is;
    None without matplotlib (the extra ``evaluate``)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    order = sorted(people, key=lambda one: _sortable(one.mean(FACE, "similarity")))
    for kind, colour, label in ((UNMODIFIED, "#999999", "no face"), (FACE, "#c0392b", "with the face")):
        points = [(x, p.values["similarity"]) for x, one in enumerate(order) for p in one.of(kind)]
        left.scatter(*_columns(points), s=9, color=colour, alpha=0.7, label=label, zorder=3)
    for limit, colour, label in (("self", "#2c3e50", "two photos"), ("floor", "#7f8c8d", "unmodified model")):
        points = [(x, one.limits[limit]) for x, one in enumerate(order)]
        left.scatter(*_columns(points), marker="_", s=120, color=colour, label=label, zorder=4)
    left.set(xlabel="person, by similarity", ylabel=f"similarity ({recogniser})", title="Similarity to the photos")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=7)
    beyond = [one.values["beyond"] for person in people for one in person.of(FACE)]
    known = [value for value in beyond if not math.isnan(value)]
    if known:
        right.hist(known, bins=np.linspace(min(*known, -0.1), max(*known, 0.1), 31), color="#c0392b")
    right.axvline(0.0, color="#2c3e50")
    right.set(xlabel="nearest photo − closest two photos", ylabel="pictures", title="Nearer than photos: right of 0")
    path = output / "similarity.png"
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png", metadata={"Software": None})
    return path


def _sortable(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    known = [point for point in points if not math.isnan(point[1])]
    return [x for x, _ in known], [y for _, y in known]
