"""From tasks to jobs: each with a name of its own, the values that go into the workflow, and a digest of it all."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tools.queue.errors import QueueError, refuse
from tools.queue.records import Task
from tools.queue.references import fit_photos
from tools.queue.workflow import Target, Targets, declared, find_target, takes_picture, title_of, typed
from tools.workflow_format import Prompt

FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
LONGEST_NAME = 120  # characters; what is added to it still fits a file system's 255 bytes


@dataclass(frozen=True)
class Job:
    """A run of the workflow.

    Attributes:
        name: of its pictures.
        prompt: the workflow with the values in it; the photo loaders hold nothing yet.
        photos: the file for each photo loader.
        seed: the task's, or the one in the workflow.
        settings: the task's, as they went into the workflow.
        digest: of the workflow, the values and the content of the photos.
    """

    name: str
    task: Task
    prompt: Prompt
    photos: Mapping[Target, Path]
    digest: str
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def filled(self, uploaded: Mapping[Path, str]) -> Prompt:
        """The workflow to queue, given what the photos are called on the server."""
        prompt = deepcopy(self.prompt)
        for (node, name), path in self.photos.items():
            prompt[node]["inputs"][name] = uploaded[path]
        return prompt

    @property
    def metadata(self) -> dict[str, Any]:
        """What the saved picture is to say about itself."""
        task = self.task
        told = {"person": task.person, "prompt": task.prompt, "seed": self.seed, **self.settings}
        told = {"id": self.name, **{name: value for name, value in told.items() if value is not None}}
        return told | ({"photos": [path.name for path in self.photos.values()]} if self.photos else {})


class Photos:
    """Photos that were looked at: each is read once, however many jobs use it."""

    def __init__(self) -> None:
        self._digests: dict[Path, str] = {}

    def digest(self, path: Path) -> str:
        """Of a photo's content. Raises ``ValueError`` if it is no picture."""
        if path not in self._digests:
            from PIL import Image, UnidentifiedImageError

            try:
                with Image.open(path) as picture:
                    picture.load()  # a file cut short opens and does not load
            except UnidentifiedImageError:
                raise ValueError(f"{path} is no picture that can be read: save it as PNG or JPEG") from None
            except (OSError, SyntaxError, Image.DecompressionBombError) as problem:
                raise ValueError(f"{path} cannot be read ({problem}): save it anew as PNG or JPEG") from None
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
        QueueError: the first ten problems, each with file and row.
    """
    problems: list[str] = []
    jobs: dict[str, Job] = {}
    photo_digest = photo_digest or Photos().digest
    for name, task in named(tasks, seeds):
        try:
            job = make_job(name, task, workflow, targets, object_info, photo_digest)
            check_name(name, task)
        except QueueError as problem:
            problems += str(problem).split("\n")
            continue
        # Some file systems take Anna and anna, or two ways to write é, for the same file.
        first = jobs.setdefault(unicodedata.normalize("NFC", name).casefold(), job)
        if first is not job:
            problems.append(f"{task.where}: id {name!r} is there twice, first in {first.task.where}: rename one")
    refuse(problems)
    return list(jobs.values())


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
    """Raise ``QueueError`` for a name that not every file system takes."""
    bad = FORBIDDEN.search(name)
    if bad:
        raise QueueError(f"{task.where}: id {name!r} holds {bad[0]!r}: a file cannot be called so; rename it")
    if name[0] == "." or name[-1] in ". " or name.split(".")[0].lower() in RESERVED or len(name) > LONGEST_NAME:
        raise QueueError(
            f"{task.where}: id {name[:60]!r} cannot name a file: no dot in front, no dot or space at the end, "
            f"at most {LONGEST_NAME} characters, and not a device of Windows such as con"
        )


def make_job(
    name: str,
    task: Task,
    workflow: Prompt,
    targets: Targets,
    object_info: dict[str, Any],
    photo_digest: Callable[[Path], str],
) -> Job:
    where, problems = task.where, []
    values: dict[Target, Any] = {}
    set_here: dict[str, Target] = {}
    photos: dict[Target, Path] = {}
    for kind, value in (("prompt", task.prompt), ("seed", task.seed)):
        to = getattr(targets, kind)
        if value is not None and not to:
            problems.append(f'{where}: the workflow does not show where the {kind} goes: --{kind}-node "TITLE.input"')
        values |= dict.fromkeys(to, value) if value is not None else {}
    if task.photos and not targets.photos:
        problems.append(f'{where}: the workflow does not show where the photos go: --photo-node "TITLE.input"')
    elif task.photos:
        try:
            workflow, loaders = fit_photos(workflow, targets.photos, len(task.photos), object_info)
            photos = dict(zip(loaders, task.photos, strict=False))
        except QueueError as problem:
            problems.append(f"{where}: {problem}")
    for setting, value in task.settings.items():
        try:
            target = find_target(workflow, setting)
        except QueueError as problem:
            problems.append(f"{where}: {problem}")
            continue
        if target in values or target in photos:
            problems.append(f"{where}: {setting!r} is filled by another column already: keep one of the two")
        elif takes_picture(declared(object_info, workflow[target.node]["class_type"], target.input)):
            photos[target] = setting_photo(value, task)
        else:
            values[target] = value
            set_here[setting] = target
    prompt = deepcopy(workflow)
    for target, value in values.items():
        node = prompt[target.node]
        try:
            value = typed(value, declared(object_info, node["class_type"], target.input))
        except ValueError as problem:
            problems.append(f"{where}: {title_of(prompt, target.node)}.{target.input}: {problem}")
        node["inputs"][target.input] = value
    contents = {}
    for target, path in photos.items():
        prompt[target.node]["inputs"][target.input] = ""
        try:
            contents[".".join(target)] = photo_digest(path)
        except (OSError, ValueError) as problem:
            problems.append(f"{where}: {problem}")
    refuse(problems)
    text = json.dumps([prompt, contents], sort_keys=True)
    seed = next((prompt[node]["inputs"][name] for node, name in targets.seed), None)
    told = {setting: prompt[target.node]["inputs"][target.input] for setting, target in set_here.items()}
    return Job(name, task, prompt, photos, hashlib.sha256(text.encode()).hexdigest(), seed, told)


def setting_photo(value: Any, task: Task) -> Path:
    """A photo named by a column of its own lies where the others of the task do."""
    from tools.queue.records import photos_of

    (path, *more) = photos_of(task.where, [str(value)], task.folder)
    if more:
        raise QueueError(f"{task.where}: {value!r} holds {len(more) + 1} photos, and this input takes one")
    return path
