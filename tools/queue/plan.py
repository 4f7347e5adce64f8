"""From tasks to jobs: each with a name of its own, the values that go into the workflow, and a digest of it all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from feedface_core.errors import FeedFaceError, refuse, shorten
from feedface_core.files.tasks import Task, photos_of
from tools.queue.references import fit_photos
from tools.queue.workflow import Target, Targets, declared, find_target, takes_picture, title_of, typed
from tools.workflow_format import Prompt

FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
LONGEST_NAME = 120  # characters
LONGEST_BYTES = 200  # of a name in UTF-8; what is added to it still fits a file system's 255


@dataclass(frozen=True)
class Job:
    """A run of the workflow.

    Attributes:
        name: of its pictures.
        workflow: with a loader for each photo; jobs share it.
        values: what goes into it.
        photos: the file for each photo loader.
        digest: of the workflow, the values and the content of the photos.
        seed: the task's, or the one in the workflow.
        settings: the task's, as they go into the workflow.
    """

    name: str
    task: Task
    workflow: Prompt
    values: Mapping[Target, Any]
    photos: Mapping[Target, Path]
    digest: str
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def filled(self, uploaded: Mapping[Path, str]) -> Prompt:
        """The workflow to queue, given what the photos are called on the server."""
        return fill(self.workflow, {**self.values, **{place: uploaded[path] for place, path in self.photos.items()}})

    @property
    def metadata(self) -> dict[str, Any]:
        """What the saved picture is to say about itself."""
        told = {"person": self.task.person, "prompt": self.task.prompt, "seed": self.seed, **self.settings}
        told = {"id": self.name, **{name: value for name, value in told.items() if value is not None}}
        return told | ({"photos": [path.name for path in self.photos.values()]} if self.photos else {})


def fill(workflow: Prompt, values: Mapping[Target, Any]) -> Prompt:
    """A copy of a workflow with other values."""
    prompt = deepcopy(workflow)
    for (node, name), value in values.items():
        prompt[node]["inputs"][name] = value
    return prompt


class Photos:
    """Photos that were looked at: each is read once, however many jobs use it."""

    def __init__(self) -> None:
        self._digests: dict[Path, str] = {}

    def digest(self, path: Path) -> str:
        """Of a photo's content. Raises ``ValueError`` if it is no picture."""
        if path not in self._digests:
            from PIL import Image, UnidentifiedImageError

            if not os.path.isfile(path):  # a pipe waits for ever, and a device has no end
                raise ValueError(f"{path} is no file: give a photo saved as PNG or JPEG")
            try:
                with Image.open(path) as picture:
                    picture.load()  # a file cut short opens and does not load
            except UnidentifiedImageError:
                raise ValueError(f"{path} is no picture that can be read: save it as PNG or JPEG") from None
            except Exception as problem:  # Pillow raises many types for what is broken
                text = str(problem)[:160]
                raise ValueError(f"{path} cannot be read ({text}): save it anew as PNG or JPEG") from None
            self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._digests[path]


def make_plan(
    tasks: Sequence[Task],
    workflow: Prompt,
    targets: Targets,
    object_info: dict[str, Any],
    seeds: Sequence[int] = (),
    photo_digest: Callable[[Path], str] | None = None,
) -> list[Job]:
    """The jobs for tasks, in their order.

    Args:
        object_info: of a server: kinds and bounds of the inputs.
        seeds: for the tasks that name none; each task once with each.
        photo_digest: tells the content of a photo, ``ValueError`` if it is none; by default it is read.

    Raises:
        FeedFaceError: the first ten problems, each with file and row.
    """
    problems: list[str] = []
    jobs: dict[str, Job] = {}
    photo_digest = photo_digest or Photos().digest

    @cache
    def fitted(count: int) -> tuple[Prompt, Targets]:
        """The workflow for so many photos, and where things go in it."""
        if not (count and targets.photos):
            return workflow, targets
        fit, places = fit_photos(workflow, targets.photos, count, object_info)
        return fit, replace(targets, photos=places)

    for name, task in named(tasks, seeds):
        try:
            check_name(name, task)
            job = make_job(name, task, *fitted_for(task, fitted), object_info, photo_digest)
        except FeedFaceError as problem:
            problems += str(problem).split("\n")
            continue
        # Some file systems take Anna and anna, or two ways to write é, for the same file.
        first = jobs.setdefault(unicodedata.normalize("NFC", name).casefold(), job)
        if first is not job:
            problems.append(f"{task.where}: id {name!r} is there twice, first in {first.task.where}: rename one")
    refuse(problems)
    return list(jobs.values())


def fitted_for(task: Task, fitted: Callable[[int], tuple[Prompt, Targets]]) -> tuple[Prompt, Targets]:
    try:
        return fitted(len(task.photos))
    except FeedFaceError as problem:
        raise FeedFaceError(f"{task.where}: {problem}") from None


def named(tasks: Sequence[Task], seeds: Sequence[int]) -> list[tuple[str, Task]]:
    """Tasks with a seed each and the names of their pictures.

    A task's own name, else person and prompt; the seed is added where it tells tasks apart.
    """
    count: Counter[str] = Counter()
    made = []
    for task in tasks:
        name = task.name
        if name is None:
            name = FORBIDDEN.sub("_", task.person or "picture")
            if not task.prompt_name:
                count[name] += 1
            name += f"_{FORBIDDEN.sub('_', task.prompt_name) or f'{count[name]:02d}'}"
        made += [
            (name, replace(task, seed=seed)) for seed in ([task.seed] if task.seed is not None else seeds or [None])
        ]
    places: dict[tuple[str, str], set[int | None]] = {}
    for name, task in made:
        places.setdefault((name, task.where), set()).add(task.seed)
    return [(f"{name}_s{task.seed}" if len(places[name, task.where]) > 1 else name, task) for name, task in made]


def check_name(name: str, task: Task) -> None:
    """Raise ``FeedFaceError`` for a name that not every file system takes."""
    bad = FORBIDDEN.search(name)
    if bad:
        raise FeedFaceError(f"{task.where}: id {shorten(name)} holds {bad[0]!r}: a file cannot be called so; rename it")
    long = len(name) > LONGEST_NAME or len(name.encode()) > LONGEST_BYTES
    if name[0] == "." or name[-1] in ". " or name.split(".")[0].lower() in RESERVED or long:
        raise FeedFaceError(
            f"{task.where}: id {name[:60]!r} cannot name a file: no dot in front, no dot or space at the end, "
            f"at most {LONGEST_NAME} characters ({LONGEST_BYTES} bytes), and not a device of Windows such as con"
        )


def make_job(
    name: str,
    task: Task,
    workflow: Prompt,
    targets: Targets,
    object_info: dict[str, Any],
    photo_digest: Callable[[Path], str],
) -> Job:
    """One job. Raises ``FeedFaceError``, a line for each problem."""
    problems: list[str] = []
    values: dict[Target, Any] = {}
    photos = dict(zip(targets.photos, task.photos, strict=False))
    for kind in ("prompt", "seed", "photos"):
        value, places = getattr(task, kind), getattr(targets, kind)
        if value in (None, ()):
            continue
        if not places:
            option = "--photo-node" if kind == "photos" else f"--{kind}-node"
            problems.append(f'the workflow shows no place for the {kind}: name it with {option} "TITLE.input"')
        elif kind != "photos":
            values |= dict.fromkeys(places, value)
    named: dict[str, Target] = {}
    for setting, value in task.settings.items():
        try:
            place = find_target(workflow, setting)
            if place in values or place in photos:
                raise FeedFaceError(f"{setting!r} is filled by another column already: keep one of the two")
            if takes_picture(declared(object_info, workflow[place.node]["class_type"], place.input)):
                photos[place] = setting_photo(value, task)
            else:
                values[place], named[setting] = value, place
        except FeedFaceError as problem:
            problems.append(str(problem))
    for place, value in values.items():
        try:
            values[place] = typed(value, declared(object_info, workflow[place.node]["class_type"], place.input))
        except ValueError as problem:
            problems.append(f"{title_of(workflow, place.node)}.{place.input}: {problem}")
    contents = {}
    for place, path in photos.items():
        try:
            contents[place] = photo_digest(path)
        except (OSError, ValueError) as problem:
            problems.append(str(problem))
    refuse([f"{task.where}: {problem}" for problem in problems])
    content = json.dumps(fill(workflow, values | contents), sort_keys=True).encode()
    seed = next((values.get(place, workflow[place.node]["inputs"][place.input]) for place in targets.seed), None)
    settings = {setting: values[place] for setting, place in named.items()}
    return Job(name, task, workflow, values, photos, hashlib.sha256(content).hexdigest(), seed, settings)


def setting_photo(value: Any, task: Task) -> Path:
    """A photo named by a column of its own lies where the others of the task do."""
    (path, *more) = photos_of("", [str(value)], task.folder)
    if more:
        raise FeedFaceError(f"{value!r} holds {len(more) + 1} photos, and this input takes one")
    return path
