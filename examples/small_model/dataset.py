"""The drawn people as a training set of the trainer: a folder of pictures and masks with a manifest."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from feedface_core.faces.crop import square_box
from trainer.data.manifest import write_rows

from .drawing import People
from .people import SIZE, detector_box


def write_dataset(people: People, folder: Path, log=print) -> Path:
    """Writes ``manifest.jsonl``, ``pictures/`` and ``masks/`` into ``folder``; files that are there are kept.

    Returns:
        The manifest, for ``data.manifest`` of the trainer's configuration.
    """
    rows = []
    for name in ("pictures", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(people.records):
        picture, mask = f"pictures/{record['id']}.png", f"masks/{record['id']}.png"
        for path, array in ((picture, people.pictures[i]), (mask, people.masks[i])):
            if not (folder / path).is_file():
                Image.fromarray(array).save(folder / path, compress_level=1)
        # every second box is like a detector's, so that the adapter learns both kinds of crops
        box = [round(v, 2) for v in detector_box(record["box"])] if i % 2 else record["box"]
        rows.append(
            {
                "path": picture,
                "caption": record["caption"],
                "width": SIZE,
                "height": SIZE,
                "bbox": box,
                "square_bbox": [round(v, 3) for v in square_box(tuple(box))],
                "mask_path": mask,
                "identity": record["identity"],
                "id": record["id"],
            }
        )
        if (i + 1) % 5000 == 0:
            log(f"dataset: {i + 1} of {len(people.records)}")
    write_rows(folder / "manifest.jsonl", rows)
    return folder / "manifest.jsonl"
