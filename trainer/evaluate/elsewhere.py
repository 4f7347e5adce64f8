"""Pictures that were made elsewhere: by ``python run.py queue``, whose summary says what each shows, or named alike."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from feedface_core.errors import located, typed
from feedface_core.files.tables import Where, parse_json, read_text
from feedface_core.files.tasks import PICTURES

from ..config.fields import as_path
from ..errors import TrainerError, first_of
from .people import Request

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"


class _Job(BaseModel):
    """A picture of the queue, as far as it matters here."""

    id: str
    person: str | None = None
    prompt: str | None = None
    seed: int | None = None
    photos: list[str] = []
    files: list[str] = []

    @property
    def whose(self) -> str | None:
        return self.person or (Path(self.photos[0]).stem if self.photos else None)


class _Summary(BaseModel):
    jobs: list[_Job]


def find_pictures(folder: str, requests: Sequence[Request], missing: str, setting: str) -> dict[Request, Path]:
    """The picture of each request.

    Args:
        folder: an output folder of the queue, ``pictures`` in it, or a folder of ``<request's name>.png``.
        missing: ``stop`` or ``skip``.
        setting: that named the folder, for messages.

    Raises:
        TrainerError: no such folder, pictures that are missing in it, or no pictures at all.
        FeedFaceError: a summary that cannot be read.
    """
    path = as_path(folder, setting)
    if not path.is_dir():
        raise TrainerError(f"{setting} {path}: no such folder")
    summary = next((place / SUMMARY for place in (path, path.parent) if (place / SUMMARY).is_file()), None)
    found = _by_name(path, requests) if summary is None else _by_summary(summary, requests)
    absent = [request for request in requests if request not in found]
    names = (f"{one.name}: {one.person}, {one.prompt[:80]!r}" for one in absent)
    if absent and (missing == "stop" or not found):
        how = f"{summary} names no file for them" if summary else f"looked for <name>.png and the like in {path}"
        raise TrainerError(
            f"{setting} {path}: {len(absent)} of {len(requests)} pictures are missing ({how}); missing=skip goes on "
            f"without them:{first_of(names, len(absent))}"
        )
    if absent:
        logger.warning(
            "%s: without %d pictures that are missing:%s", setting, len(absent), first_of(names, len(absent))
        )
    return found


def _by_summary(path: Path, requests: Sequence[Request]) -> dict[Request, Path]:
    with located(path):
        value: Any = parse_json(read_text(path), Where(path))
        if not isinstance(value, dict) or "jobs" not in value:
            raise TrainerError("is no summary of the queue: expected an object with jobs")
        jobs = typed(TypeAdapter(_Summary), value).jobs
    known: dict[tuple[str | None, str | None], list[_Job]] = defaultdict(list)
    for job in jobs:
        if job.files:
            known[job.whose, job.prompt].append(job)
    found = {}
    for request in requests:
        own = known.get((request.person, request.prompt), [])
        chosen = own if len(own) == 1 else [job for job in own if job.seed == request.seed]
        pictures = path.parent / "pictures"
        files = [pictures / job.files[0] for job in chosen]
        if files and files[0].is_file() and files[0].resolve().is_relative_to(pictures.resolve()):
            found[request] = files[0]
    return found


def _by_name(path: Path, requests: Sequence[Request]) -> dict[Request, Path]:
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix.lower() in PICTURES}
    return {request: files[request.name] for request in requests if request.name in files}
