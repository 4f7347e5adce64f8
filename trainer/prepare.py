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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from feedface_core.errors import FeedFaceError
from feedface_core.faces import crop as crops
from feedface_core.faces.detectors import INSIGHTFACE
from feedface_core.faces.recognisers import Recogniser
from feedface_core.files.atomic import replacing

from .config import PrepareSettings
from .config.fields import as_path, make_folder
from .data import pictures
from .data.manifest import write_rows
from .errors import TrainerError, first_of
from .preparation import masks, on_ray
from .preparation.captions import Caption, choose_backend
from .preparation.identities import compares_faces, identify, named_identity
from .preparation.inputs import find_photos
from .preparation.journal import NAME as PROGRESS
from .preparation.journal import Journal
from .preparation.photo import Batch, Photo
from .preparation.recognise import Recognise, load_recogniser
from .preparation.report import contact_sheet, summarise, table
from .preparation.stages import FindFace, Mask, Write

logger = logging.getLogger(__name__)

DUPLICATE_DISTANCE = 4
LOCK = "prepare.lock"
RESEARCH_ONLY = (
    "InsightFace worked on these photos, and its model packs are for non-commercial research only; "
    "detect.detector=mtcnn and identity.recogniser=dlib have no such limit."
)
_COLUMNS = ("id", "path", "caption", "width", "height", "bbox", "square_bbox", "mask_path", "crop_path", "identity")


class Pipeline:
    """All stages, one after the other: ``pipeline(batch) -> batch``.

    Args:
        settings: of the stages.
        root: folder that the table's paths are relative to.
        detect: False if every photo came with its box.
        recognise: whether there are photos whose faces are compared.

    Raises:
        FeedFaceError: a detector, parser or model that is missing: before any photo is read.
    """

    def __init__(self, settings: PrepareSettings, root: Path, detect: bool, recognise: bool) -> None:
        self.stages: list[Callable[[Batch], Batch]] = [
            FindFace(settings.detect if detect else None, settings.filter, settings.crop),
            Mask(settings.mask, root),
            Caption(settings.caption),
            Write(Path(settings.output)),
        ]
        if recognise:
            recogniser = load_recogniser(settings.identity, settings.detect)
            self.stages.insert(-1, Recognise(recogniser, settings.identity))

    def __call__(self, batch: Batch) -> Batch:
        for stage in self.stages:
            batch = stage(batch)
        return batch


def prepare(settings: PrepareSettings, progress: bool = True) -> dict[str, Any]:
    """Prepare the photos and return the summary.

    Raises:
        FeedFaceError: no photos, a table or settings that cannot be used, a model that is missing, or an output folder
            that another run writes to.
    """
    from filelock import FileLock, Timeout

    output = as_path(settings.output, "output")
    settings = settings.model_copy(update={"output": str(output)})
    photos, root = find_photos(settings.photos, output)
    for photo in photos:  # a pattern that takes too long
        if not compares_faces(photo, settings.identity):
            named_identity(photo, settings.identity)
    for folder in ("", "masks", "crops"):
        make_folder(output / folder, "output")
    for name in (f"manifest.{settings.manifest}", "dropped.jsonl", "summary.json", "contact_sheet.png", LOCK, PROGRESS):
        if (output / name).is_dir():
            raise TrainerError(f"{output / name}: a folder is where a file is to be written")
    try:  # the system lets go of the lock however this process ends
        with FileLock(output / LOCK, timeout=0):
            return _prepare(settings, photos, root, output, progress)
    except Timeout as error:
        raise TrainerError(f"{output}: another trainer.prepare is writing to this folder") from error


def _prepare(
    settings: PrepareSettings, photos: list[Photo], root: Path, output: Path, progress: bool
) -> dict[str, Any]:
    recogniser, why_not = _recogniser(settings, photos)
    # What the outcome of the stages depends on.
    depends = settings.model_dump(include={"detect", "filter", "crop", "mask"})
    if settings.filter.people == 1:
        del depends["filter"]["people"]  # what earlier versions did is still good
    depends["versions"] = [crops.VERSION, masks.VERSION, pictures.VERSION]
    depends["caption"] = settings.caption.model_dump(include={"model", "prompt", "most_tokens"})
    journal = Journal(output, json.dumps(depends, sort_keys=True), recogniser and recogniser.name)
    wanted = "found" if settings.identity.source == "cluster" else "looked for"

    def done_before(photo: Photo) -> bool:
        compared = recogniser is not None and compares_faces(photo, settings.identity)
        return journal.restore(photo, settings.caption.model is not None, wanted if compared else "no")

    todo = [photo for photo in photos if not done_before(photo)]
    if len(todo) < len(photos):
        logger.info("%d of %d photos were done before", len(photos) - len(todo), len(photos))
    done = {}
    for photo in _work(settings, root, todo, recogniser is not None, progress):
        journal.add(photo)
        done[photo.id] = photo
    photos = [done.get(photo.id, photo) for photo in photos]
    for photo in photos:
        _finish_caption(photo, required=settings.caption.missing == "drop")
    if refused := [f"{photo.id}: {photo.detail}" for photo in photos if photo.kept and photo.detail]:
        logger.warning("%d photos are without a caption:%s", len(refused), first_of(refused))
    kept = [photo for photo in photos if photo.kept]
    people = identify(
        kept, settings.identity, recogniser and (settings.identity.distance or recogniser.distance), why_not
    )
    for photo in kept:
        row = {**photo.row, "id": photo.id, "path": _relative(photo.path, output), "identity": people.names[photo.id]}
        if consent := photo.given.get("consent") or settings.consent:
            row["consent"] = consent
        photo.row = {name: row[name] for name in (*_COLUMNS, *(name for name in row if name not in _COLUMNS))}
    dropped = [{"id": own.id, "reason": own.reason, "detail": own.detail} for own in photos if not own.kept]
    summary = summarise(photos, people, DUPLICATE_DISTANCE)
    if INSIGHTFACE in summary["detectors"] or (recogniser is not None and recogniser.name.startswith(INSIGHTFACE)):
        summary["notes"].append(RESEARCH_ONLY)
    write_rows(output / f"manifest.{settings.manifest}", [photo.row for photo in kept])
    write_rows(output / "dropped.jsonl", dropped)
    with replacing(output / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
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


def _work(
    settings: PrepareSettings, root: Path, todo: Sequence[Photo], recognise: bool, progress: bool
) -> Iterator[Photo]:
    """The photos through the pipeline, here, in other processes, or on Ray."""
    from tqdm import tqdm

    if not todo:
        return
    settings = choose_backend(settings)
    size = settings.batch_size
    batches = [list(todo[start : start + size]) for start in range(0, len(todo), size)]
    arguments = settings, root, any("bbox" not in photo.given for photo in todo), recognise
    pipeline = Pipeline(*arguments)  # in any case: an error elsewhere would have no message
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(todo), unit="photo", disable=None if progress else True))
        results = map(pipeline, batches)
        if settings.runner == "ray":
            sections = settings.detect, settings.mask, settings.caption
            gpus = float(any(section.device.startswith("cuda") for section in sections))
            results = on_ray.work(Pipeline, arguments, batches, settings.workers, gpus)
        elif settings.workers:
            # Fork would copy the threads' locks of torch and onnxruntime in whatever state they are.
            pool = ProcessPoolExecutor(settings.workers, get_context("spawn"), _start_worker, arguments)
            results = stack.enter_context(pool).map(_work_on, batches)
        try:
            for batch in results:
                yield from batch
                bar.update(len(batch))
        except BrokenProcessPool as error:
            raise TrainerError(
                f"one of workers={settings.workers} processes was ended, as the system does when memory runs out. Go "
                "on with fewer of them; what was done is kept"
            ) from error


def _start_worker(*arguments: Any) -> None:
    global _pipeline
    torch.set_num_threads(1)
    _pipeline = Pipeline(*arguments)


def _work_on(batch: Batch) -> Batch:
    return _pipeline(batch)


def _finish_caption(photo: Photo, required: bool) -> None:
    """Captions may change from run to run without working on the photos again."""
    if caption := photo.given.get("caption"):
        photo.row["caption"] = caption
        photo.row.pop("captioned_by", None)
        photo.detail = photo.detail if photo.reason else ""  # it was of a caption
    elif photo.kept and not photo.row.get("caption"):
        photo.row["caption"], photo.reason = "", "no caption" if required else ""


def _relative(path: Path, folder: Path) -> str:
    """The path from the manifest's folder; absolute where there is none (another drive)."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()


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
    output = Path(options.output)
    try:
        settings = PrepareSettings.load(options.config, options.settings, photos=options.photos, output=options.output)
        summary = prepare(settings)
    except (FeedFaceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(summary))
    if not summary["kept"]:
        print(f"error: no photo was kept; {output / 'dropped.jsonl'} says why", file=sys.stderr)
        return 1
    sheet = f"; look at {output / 'contact_sheet.png'}" if settings.sheet else ""
    print(f"\nwritten: {output / f'manifest.{settings.manifest}'}{sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
