"""From photos to a manifest with face boxes, crops, masks, captions and identities.

    python -m trainer.prepare photos/ dataset/
    python -m trainer.prepare table.csv dataset/ filter.minimum_face=96 identity.source=cluster workers=4

The first two arguments are the photos (a folder, a glob, or a table) and the output folder; then settings. Run again,
it goes on where it stopped, and looks only at photos that are new or have changed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from feedface_core.faces import FaceError
from feedface_core.faces import crop as crops
from trainer.preparation import masks as parsing

from .config import PrepareSettings
from .data import pictures
from .data.manifest import write_rows
from .errors import TrainerError
from .preparation.captions import Caption
from .preparation.faces import Crop, Detect, Filter, Mask, Read, Write
from .preparation.identities import People, compares_faces, compile_pattern, identify
from .preparation.inputs import find_photos
from .preparation.journal import Journal
from .preparation.photo import Batch, Photo
from .preparation.recognisers import Recognise, Recogniser, load_recogniser
from .preparation.report import contact_sheet, summarise, table

logger = logging.getLogger(__name__)

DUPLICATE_DISTANCE = 4
_COLUMNS = ("id", "path", "caption", "width", "height", "bbox", "square_bbox", "mask_path", "crop_path", "identity")


class Pipeline:
    """All stages, one after the other: ``pipeline(batch) -> batch``.

    Args:
        settings: of the stages.
        root: folder that the table's paths are relative to.
        detect: False if every photo came with its box.
        recogniser: for photos whose faces are compared; None compares none.

    Raises:
        TrainerError, FaceError: a detector, parser or model that is missing: before any photo is read.
    """

    def __init__(
        self, settings: PrepareSettings, root: Path, detect: bool = True, recogniser: Recogniser | None = None
    ) -> None:
        self.stages: list[Callable[[Batch], Batch]] = [
            Read(),
            Detect(settings.detect if detect else None),
            Filter(settings.filter),
            Crop(settings.crop),
            Mask(settings.mask, root),
            Caption(settings.caption),
        ]
        if recogniser is not None:
            wanted = partial(compares_faces, settings=settings.identity)
            self.stages.append(Recognise(recogniser, wanted, required=settings.identity.source == "cluster"))
        self.stages.append(Write(Path(settings.output)))

    def __call__(self, batch: Batch) -> Batch:
        for stage in self.stages:
            batch = stage(batch)
        return batch


def prepare(settings: PrepareSettings, progress: bool = True) -> dict[str, Any]:
    """Prepare the photos and return the summary.

    Raises:
        TrainerError: no photos, a table that cannot be used, or an output folder that another run writes to.
        TrainerError, FaceError: settings that cannot be used, or a model that is missing.
    """
    if settings.identity.source == "pattern" or settings.identity.pattern is not None:
        compile_pattern(settings.identity.pattern)
    output = Path(settings.output).expanduser()
    settings = settings.model_copy(update={"output": str(output)})
    photos, root = find_photos(settings.photos, output)
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        return _prepare(settings, photos, root, output, progress)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keeps a second run out of the folder; the system lets go of the lock however this one ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(output / "prepare.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrainerError(f"{output}: another trainer.prepare is writing to this folder") from error
    try:
        yield
    finally:
        lock.release()


def _prepare(
    settings: PrepareSettings, photos: list[Photo], root: Path, output: Path, progress: bool
) -> dict[str, Any]:
    recogniser, why_not = _recogniser(settings, photos)
    journal = Journal(output, _stage_settings(settings), None if recogniser is None else recogniser.name)
    journal.load()
    wants_caption = settings.caption.model is not None
    wanted = "found" if settings.identity.source == "cluster" else "looked for"

    def done_before(photo: Photo) -> bool:
        compared = recogniser is not None and compares_faces(photo, settings.identity)
        return journal.restore(photo, wants_caption, wanted if compared else "no")

    todo = [photo for photo in photos if not done_before(photo)]
    if len(todo) < len(photos):
        logger.info("%d of %d photos were done before", len(photos) - len(todo), len(photos))
    done = {photo.id: photo for photo in _work(settings, root, todo, journal, recogniser, progress)}
    photos = [done.get(photo.id, photo) for photo in photos]
    _finish_captions(photos, settings)
    kept = [photo for photo in photos if photo.kept]
    limit = None if recogniser is None else settings.identity.distance or recogniser.distance
    people = identify(kept, settings.identity, limit, why_not)
    _finish_rows(kept, people, output)
    write_rows(output / f"manifest.{settings.manifest}", [photo.row for photo in photos if photo.kept])
    _write_json_lines(output / "dropped.jsonl", photos)
    summary = summarise(photos, people, DUPLICATE_DISTANCE)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if settings.sheet:
        contact_sheet(photos, output, settings.sheet)
    return summary


def _recogniser(settings: PrepareSettings, photos: Sequence[Photo]) -> tuple[Recogniser | None, str]:
    """The recogniser if faces have to be compared, or None and why not.

    Raises:
        TrainerError: if faces have to be compared and there is no recogniser, or not the one that was asked for.
    """
    if not any(compares_faces(photo, settings.identity) for photo in photos):
        return None, ""
    try:
        return load_recogniser(settings.identity, settings.detect), ""
    except TrainerError as error:
        if settings.identity.source == "cluster" or settings.identity.recogniser != "auto":
            raise
        return None, str(error)


def _stage_settings(settings: PrepareSettings) -> str:
    """What the outcome of the stages depends on."""
    parts = settings.model_dump(include={"detect", "filter", "crop", "mask"})
    parts["versions"] = [crops.VERSION, parsing.VERSION, pictures.VERSION]
    parts["caption"] = settings.caption.model_dump(include={"model", "prompt", "most_tokens"})
    return json.dumps(parts, sort_keys=True)


def _work(
    settings: PrepareSettings,
    root: Path,
    todo: Sequence[Photo],
    journal: Journal,
    recogniser: Recogniser | None,
    progress: bool,
) -> Iterator[Photo]:
    from tqdm import tqdm

    if not todo:
        return
    detect = any("bbox" not in photo.given for photo in todo)
    size = settings.batch_size
    batches = [list(todo[place : place + size]) for place in range(0, len(todo), size)]
    try:
        with tqdm(total=len(todo), unit="photo", disable=None if progress else True) as bar:
            for batch in _run(settings, root, detect, recogniser, batches):
                for photo in batch:
                    journal.add(photo)
                    yield photo
                bar.update(len(batch))
    finally:
        journal.close()


def _run(
    settings: PrepareSettings, root: Path, detect: bool, recogniser: Recogniser | None, batches: Iterable[Batch]
) -> Iterator[Batch]:
    """The batches through the pipeline, here or in other processes, in their order."""
    pipeline = Pipeline(settings, root, detect, recogniser)  # in any case: an error elsewhere would have no message
    if settings.workers == 0:
        yield from map(pipeline, batches)
        return
    # Fork would copy the threads' locks of torch and onnxruntime in whatever state they are.
    context = get_context("spawn")
    arguments = (settings, root, detect, recogniser is not None)
    with ProcessPoolExecutor(settings.workers, context, _start_worker, arguments) as pool:
        yield from pool.map(_work_on, batches)


_pipeline: Pipeline | None = None


def _start_worker(settings: PrepareSettings, root: Path, detect: bool, recognise: bool) -> None:
    global _pipeline
    torch.set_num_threads(1)
    recogniser = load_recogniser(settings.identity, settings.detect) if recognise else None
    _pipeline = Pipeline(settings, root, detect, recogniser)


def _work_on(batch: Batch) -> Batch:
    assert _pipeline is not None
    return _pipeline(batch)


def _finish_captions(photos: Sequence[Photo], settings: PrepareSettings) -> None:
    """Captions may change from run to run without working on the photos again."""
    for photo in photos:
        if not photo.kept:
            continue
        caption = photo.given.get("caption")
        if caption:
            photo.row["caption"] = caption
            photo.row.pop("captioned_by", None)
        elif not photo.row.get("caption"):
            photo.row["caption"] = ""
            if settings.caption.missing == "drop":
                photo.reason = "no caption"


def _finish_rows(kept: Sequence[Photo], people: People, output: Path) -> None:
    """The manifest's rows, with their columns in order."""
    for photo in kept:
        row = {**photo.row, "id": photo.id, "path": _relative(photo.path, output), "identity": people.names[photo.id]}
        photo.row = {name: row[name] for name in (*_COLUMNS, *(name for name in row if name not in _COLUMNS))}


def _relative(path: Path, folder: Path) -> str:
    """The path from the manifest's folder; absolute where there is none (another drive)."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()


def _write_json_lines(path: Path, photos: Sequence[Photo]) -> None:
    lines = [
        json.dumps({"id": photo.id, "reason": photo.reason, "detail": photo.detail}, ensure_ascii=False) + "\n"
        for photo in photos
        if not photo.kept
    ]
    path.write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 if photos were kept, 1 if none was or something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.prepare",
        description="Photos → manifest, face crops and masks.",
        epilog="Settings (setting=value):\n" + PrepareSettings.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("photos", help="a folder, a glob, or a CSV, JSONL or Parquet table")
    parser.add_argument("output", help="folder of the manifest")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    parser.add_argument("--config", help="a YAML file with settings")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = PrepareSettings.load(options.config, options.settings, photos=options.photos, output=options.output)
        summary = prepare(settings)
    except (TrainerError, FaceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(summary))
    output = Path(settings.output)
    if not summary["kept"]:
        print(f"error: no photo was kept; {output / 'dropped.jsonl'} says why", file=sys.stderr)
        return 1
    sheet = f"; look at {output / 'contact_sheet.png'}" if settings.sheet else ""
    print(f"\nwritten: {output / f'manifest.{settings.manifest}'}{sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
