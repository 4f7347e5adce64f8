"""What the user sees in the end: a table and a contact sheet."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from feedface_core.errors import FeedFaceError
from feedface_core.faces import clamp_square, square_box
from feedface_core.files.atomic import replacing

from ..data import pictures
from .identities import People
from .neighbours import near_pairs
from .photo import Photo

if TYPE_CHECKING:
    from PIL.Image import Image

CELL, LINE, COLUMNS = 192, 14, 4
AROUND = 3.0
"""The sheet shows the square of so many times the face crop: room for the hair."""
KEPT, DROPPED, PAPER, TINT = (30, 30, 30), (190, 30, 30), (255, 255, 255), (60, 200, 120)


def summarise(photos: Sequence[Photo], people: People, duplicate_distance: int) -> dict[str, Any]:
    """Counts of photos by what became of them, and sentences that the user should read."""
    kept = [photo.row for photo in photos if photo.kept]
    hashes: dict[str, list[tuple[int, int]]] = defaultdict(list)  # of each person's photos and crops
    faces = [(row, face) for row in kept for face in (row, *row.get("faces", ()))]
    for row, face in faces:
        if face["identity"]:
            hashes[face["identity"]].append((int(row["photo_hash"], 16), int(face["crop_hash"], 16)))
    sizes = sorted(map(len, hashes.values()))
    noted = sum("consent" in row for row in kept)

    def count(values: Iterable[str]) -> dict[str, int]:
        return dict(Counter(values).most_common())

    return {
        "photos": len(photos),
        "kept": len(kept),
        "dropped": count(photo.reason for photo in photos if not photo.kept),
        **({"further_faces": len(faces) - len(kept)} if len(faces) > len(kept) else {}),
        "masks": count(row["mask_kind"] for row in kept),
        "detectors": count(row["detector"] for row in kept),
        "captions": count(
            "model" if row.get("captioned_by") else "given" if row["caption"] else "none" for row in kept
        ),
        "consent": {"noted": noted, "not noted": len(kept) - noted} if noted else {},
        "identities": len(hashes),
        "identities_from": dict(people.origins.most_common()),
        "photos_per_identity": [sizes[0], median(sizes), sizes[-1]] if sizes else [],
        "without_other_photo": len(faces) - sum(size for size in sizes if size > 1),
        "near_duplicate_pairs": sum(_near_duplicates(own, duplicate_distance) for own in hashes.values()),
        "notes": people.notes,
    }


def _near_duplicates(hashes: Sequence[tuple[int, int]], distance: int) -> int:
    """Pairs of a person's photos of which photos or crops are nearly the same."""
    pairs = [near_pairs(np.array(kind, np.uint64), distance) for kind in zip(*hashes, strict=True)]
    return len(np.unique(np.concatenate(pairs), axis=0))


def table(summary: dict[str, Any]) -> str:
    """The summary as aligned lines, and its notes."""
    lines = {}
    for name, value in summary.items():
        title = name.replace("_", " ")
        if isinstance(value, dict):
            lines |= {f"{title}: {key}": count for key, count in value.items()}
        elif name == "photos_per_identity":
            lines["photos an identity (least, median, most)"] = ", ".join(f"{count:g}" for count in value) or "none"
        elif name != "notes":
            lines[title] = value
    width = max(map(len, lines))
    return "\n".join([*(f"{title:<{width}}  {value}" for title, value in lines.items()), *summary["notes"]])


def contact_sheet(photos: Sequence[Photo], output: Path, most: int) -> Path:
    """A picture of faces with mask and boxes, and of their crops; dropped photos with the reason in red.

    Args:
        photos: all photos.
        output: folder of the manifest; the sheet goes to ``contact_sheet.png`` in it.
        most: photos shown; a quarter of them may be dropped ones. Taken evenly from all.
    """
    from PIL import Image, ImageDraw, ImageFont

    dropped = _evenly([photo for photo in photos if not photo.kept and photo.path.is_file()], most // 4)
    shown = [*_evenly([photo for photo in photos if photo.kept], most - len(dropped)), *dropped]
    width, height = 2 * CELL + 8, CELL + 2 * LINE + 8
    sheet = Image.new("RGB", (COLUMNS * width, max(-(-len(shown) // COLUMNS), 1) * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LINE - 3)
    for position, photo in enumerate(shown):
        x, y = position % COLUMNS * width, position // COLUMNS * height
        for offset, picture in enumerate(_pictures(photo, output)):
            sheet.paste(picture, (x + offset * CELL, y))
        first, second = photo.id[-40:], f"{photo.reason}: {photo.detail}"
        if photo.kept:
            first += f"  {photo.row.get('identity') or 'no identity'}"
            second = f"{photo.row['mask_kind']}  {photo.row['mask_area']:.1%}  {photo.row['caption']}"
        draw.text((x + 2, y + CELL + 1), first[:70], fill=KEPT, font=font)
        draw.text((x + 2, y + CELL + 1 + LINE), second[:66], fill=KEPT if photo.kept else DROPPED, font=font)
    path = output / "contact_sheet.png"
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")
    return path


def _evenly(photos: Sequence[Photo], most: int) -> Sequence[Photo]:
    return photos if len(photos) <= most else [photos[n * len(photos) // most] for n in range(most)]


def _pictures(photo: Photo, output: Path) -> list[Image]:
    """The photo around its face with mask and boxes, and the crop; the whole of a dropped photo."""
    from PIL import Image, ImageDraw, ImageOps

    try:
        picture = pictures.open_photo(photo.path)
    except FeedFaceError:
        return []
    if not photo.kept:
        return [ImageOps.pad(picture, (CELL, CELL), color=(225, 225, 225))]
    around = clamp_square(square_box(photo.row["square_bbox"], AROUND), *picture.size)
    scale = CELL / (around[2] - around[0])
    small = picture.resize((CELL, CELL), box=around)
    with pictures.open_picture(output / photo.row["mask_path"]) as file:
        mask = file.convert("L").resize(picture.size).resize((CELL, CELL), box=around)
    small = Image.composite(Image.blend(small, Image.new("RGB", small.size, TINT), 0.45), small, mask)
    draw = ImageDraw.Draw(small)
    for column, colour in (("square_bbox", (255, 220, 0)), ("bbox", (255, 120, 0))):
        corners = zip(photo.row[column], (around[0], around[1]) * 2, strict=True)
        draw.rectangle([(value - origin) * scale for value, origin in corners], outline=colour)
    with pictures.open_picture(output / photo.row["crop_path"]) as file:
        return [small, file.convert("RGB").resize((CELL, CELL))]
