"""What the user sees in the end: a table and a contact sheet."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from feedface_core.faces import FaceError, clamp_square, square_box

from ..data import pictures
from .identities import People
from .photo import Photo

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 192
LINE = 14
COLUMNS = 4
AROUND = 3.0
"""The sheet shows the square of so many times the face crop: room for the hair."""
KEPT, DROPPED, PAPER = (30, 30, 30), (190, 30, 30), (255, 255, 255)
TINT = (60, 200, 120)


def summarise(photos: Sequence[Photo], people: People, duplicate_distance: int) -> dict[str, Any]:
    """Counts of photos by what became of them, and sentences that the user should read."""
    kept = [photo for photo in photos if photo.kept]
    members: dict[str, list[Photo]] = defaultdict(list)
    for photo in kept:
        if photo.row.get("identity"):
            members[photo.row["identity"]].append(photo)
    sizes = sorted(len(own) for own in members.values())
    captions = Counter("model" if p.row.get("captioned_by") else "given" if p.row["caption"] else "none" for p in kept)
    return {
        "photos": len(photos),
        "kept": len(kept),
        "dropped": dict(Counter(photo.reason for photo in photos if not photo.kept).most_common()),
        "masks": dict(Counter(photo.row["mask_kind"] for photo in kept).most_common()),
        "detectors": dict(Counter(photo.row["detector"] for photo in kept).most_common()),
        "captions": dict(captions),
        "identities": len(members),
        "identities_from": dict(people.origins.most_common()),
        "photos_per_identity": [sizes[0], median(sizes), sizes[-1]] if sizes else [],
        "without_other_photo": len(kept) - sum(size for size in sizes if size > 1),
        "near_duplicate_pairs": sum(_duplicates(own, duplicate_distance) for own in members.values()),
        "notes": people.notes,
    }


def _duplicates(members: Sequence[Photo], distance: int) -> int:
    hashes = [(int(photo.row["photo_hash"], 16), int(photo.row["crop_hash"], 16)) for photo in members]
    return sum(
        any(pictures.hash_distance(a, b) <= distance for a, b in zip(first, second, strict=True))
        for place, first in enumerate(hashes)
        for second in hashes[:place]
    )


def table(summary: dict[str, Any]) -> str:
    """The summary as aligned lines, and its notes."""
    lines = [("photos", summary["photos"]), ("kept", summary["kept"])]
    lines += [(f"dropped: {reason}", count) for reason, count in summary["dropped"].items()]
    lines += [(f"detector: {name}", count) for name, count in summary["detectors"].items()]
    lines += [(f"mask: {kind}", count) for kind, count in summary["masks"].items()]
    lines += [(f"caption: {kind}", count) for kind, count in summary["captions"].items()]
    lines += [(f"identity: {origin}", count) for origin, count in summary["identities_from"].items()]
    lines.append(("identities", summary["identities"]))
    if summary["photos_per_identity"]:
        low, middle, high = summary["photos_per_identity"]
        lines.append(("photos an identity (least, median, most)", f"{low}, {middle:g}, {high}"))
    lines.append(("without another photo of the person", summary["without_other_photo"]))
    lines.append(("pairs of near-duplicates", summary["near_duplicate_pairs"]))
    width = max(len(name) for name, _ in lines)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in lines), *summary["notes"]])


def contact_sheet(photos: Sequence[Photo], output: Path, most: int) -> Path:
    """A picture of faces with mask and boxes, and of their crops; dropped photos with the reason in red.

    Args:
        photos: all photos.
        output: folder of the manifest; the sheet goes to ``contact_sheet.png`` in it.
        most: photos shown; a quarter of them may be dropped ones. Taken evenly from all.
    """
    from PIL import Image, ImageDraw, ImageFont

    dropped = _evenly([photo for photo in photos if not photo.kept and photo.path.is_file()], most // 4)
    kept = _evenly([photo for photo in photos if photo.kept], most - len(dropped))
    shown = [*kept, *dropped]
    height = CELL + 2 * LINE + 8
    rows = max(-(-len(shown) // COLUMNS), 1)
    sheet = Image.new("RGB", (COLUMNS * (2 * CELL + 8), rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LINE - 3)
    for place, photo in enumerate(shown):
        x, y = place % COLUMNS * (2 * CELL + 8), place // COLUMNS * height
        for offset, picture in enumerate(_pictures(photo, output)):
            sheet.paste(picture, (x + offset * CELL, y))
        first, second = _labels(photo)
        colour = KEPT if photo.kept else DROPPED
        draw.text((x + 2, y + CELL + 1), first, fill=KEPT, font=font)
        draw.text((x + 2, y + CELL + 1 + LINE), second, fill=colour, font=font)
    path = output / "contact_sheet.png"
    sheet.save(path)
    return path


def _evenly(photos: Sequence[Photo], most: int) -> list[Photo]:
    if len(photos) <= most:
        return list(photos)
    return [photos[place * len(photos) // most] for place in range(most)]


def _labels(photo: Photo) -> tuple[str, str]:
    first = photo.id[-40:]
    if not photo.kept:
        return first, f"{photo.reason}: {photo.detail}"[:70]
    who = photo.row.get("identity") or "no identity"
    return f"{first}  {who}"[:70], f"{photo.row['mask_kind']}  {photo.row['mask_area']:.1%}  {photo.row['caption']}"[
        :62
    ]


def _pictures(photo: Photo, output: Path) -> list[Image]:
    """The photo around its face with mask and boxes, and the crop; the whole of a dropped photo."""
    from PIL import Image, ImageDraw

    try:
        picture = pictures.open_photo(photo.path)
    except FaceError:
        return []
    if not photo.kept:
        picture.thumbnail((CELL, CELL))
        return [_centred(picture)]
    around = clamp_square(square_box(photo.row["square_bbox"], AROUND), *picture.size)
    scale = CELL / (around[2] - around[0])
    small = picture.resize((CELL, CELL), box=around)
    with Image.open(output / photo.row["mask_path"]) as file:
        mask = file.convert("L").resize(picture.size).resize((CELL, CELL), box=around)
    small = Image.composite(Image.blend(small, Image.new("RGB", small.size, TINT), 0.45), small, mask)
    draw = ImageDraw.Draw(small)
    for column, colour in (("square_bbox", (255, 220, 0)), ("bbox", (255, 120, 0))):
        corners = zip(photo.row[column], (around[0], around[1]) * 2, strict=True)
        draw.rectangle([(value - origin) * scale for value, origin in corners], outline=colour)
    with Image.open(output / photo.row["crop_path"]) as file:
        crop = file.convert("RGB").resize((CELL, CELL))
    return [small, crop]


def _centred(picture: Image) -> Image:
    from PIL import Image

    cell = Image.new("RGB", (CELL, CELL), (225, 225, 225))
    cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    return cell
