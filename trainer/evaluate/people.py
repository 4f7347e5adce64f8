"""Who is evaluated: people with photos, and the pictures that are asked for of each."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from feedface_core.errors import listing, shorten
from feedface_core.faces import Box
from feedface_core.files.tables import KINDS
from feedface_core.files.tasks import PICTURES, Task, read_tasks

from ..config import EvaluateSettings
from ..config.fields import Text, as_path
from ..data.jsonl import read_lines, read_objects
from ..data.manifest import read_manifest
from ..errors import TrainerError, explain, first_of

logger = logging.getLogger(__name__)

FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|\s]+')
LONGEST_NAME = 80
GROUP = re.compile(r"(\d+)_(\d+)")
"""PPR10K's names: ``<group>_<index>.tif``; a group is one sitting of one person."""
_VERSIONS = ("val", "test", "train", "target_a", "target_b", "target_c", "source")
_TEXT = TypeAdapter(Text)


@dataclass(frozen=True)
class Photo:
    """A photo of a person, with the box of the face where it is known."""

    path: Path
    box: Box | None = None


@dataclass(frozen=True)
class Request:
    """A picture that is asked for.

    Args:
        name: of its file, without suffix.
        person: whom it is to show.
        prompt: what.
        seed: as the input or the settings name it.
        round: pictures of one prompt and seed that differ in nothing but the noise are numbered from 0.
        row: id of the input's row, where a row asked for it.
    """

    name: str
    person: str
    prompt: str
    seed: int
    round: int = 0
    row: str | None = None


@dataclass(frozen=True)
class Person:
    """A person: the name, at least one photo, and at least one request."""

    name: str
    photos: tuple[Photo, ...]
    requests: tuple[Request, ...]

    def unmodified(self, count: int) -> list[Request]:
        """What is asked of the unmodified model: every request, in the same noise, then more of the prompts in turn
        until there are ``count``; nothing for 0."""
        own, number = self.requests, max(count, len(self.requests)) if count else 0
        return [
            replace(own[index % len(own)], round=turn, name=own[index % len(own)].name + (f"_n{turn}" if turn else ""))
            for index, turn in ((index, index // len(own)) for index in range(number))
        ]


@dataclass
class _Input:
    """What an input says of a person: photos, and (prompt, name of the prompt, seed, id of the row)."""

    photos: dict[Path, Photo]
    prompts: list[tuple[str, str, int | None, str | None]]


def read_people(settings: EvaluateSettings) -> list[Person]:
    """The people that the settings name.

    Raises:
        TrainerError, FeedFaceError: an input that cannot be read, or without people, photos or prompts; two people
            whose pictures would have the same names.
    """
    path = as_path(settings.people, "people")
    prompts = None if settings.prompts is None else read_prompts(as_path(settings.prompts, "prompts"))
    found = _read(path, None if settings.photos is None else as_path(settings.photos, "photos"))
    if len(found) > settings.most_people:
        logger.info("the first %d of %d people (most_people)", settings.most_people, len(found))
    chosen = dict(list(found.items())[: settings.most_people])
    problems, people, names = [], [], {}
    for name, own in chosen.items():
        if prompts is not None:
            own.prompts = [(prompt, f"{number:02d}", None, None) for number, prompt in enumerate(prompts, 1)]
        if not own.photos:
            problems.append(f"{shorten(name)} has no photos")
        if not own.prompts:
            problems.append(f"{shorten(name)} has no prompts; prompts=FILE gives everybody those of a text file")
        file = FORBIDDEN.sub("_", name)[:LONGEST_NAME].strip("._ ") or "person"
        key = unicodedata.normalize("NFC", file).casefold()
        if names.setdefault(key, name) != name:
            problems.append(f"{shorten(names[key])} and {shorten(name)}: their pictures would be called alike: rename")
        photos = tuple(own.photos.values())[: settings.most_photos]
        people.append(Person(name, photos, tuple(_requests(name, file, own, settings))))
    if problems:
        raise TrainerError(f"people {path}:{first_of(problems)}")
    return people


def _read(path: Path, photos: Path | None) -> dict[str, _Input]:
    """What the input says of each person, in its order."""
    if path.is_dir() and not any(file.suffix.lower() in KINDS for file in path.iterdir()):
        return _from_folder(path)
    if path.suffix.lower() == ".parquet" or _is_manifest(path):
        return _from_manifest(path, photos)
    return _from_tasks(read_tasks([path], photos))


def _from_tasks(tasks: Iterable[Task]) -> dict[str, _Input]:
    found: dict[str, _Input] = {}
    for task in tasks:
        name = task.person or (task.photos[0].stem if task.photos else "")
        if not name:
            raise TrainerError(f"{task.where}: neither a person nor photos: nobody to compare the picture with")
        own = found.setdefault(name, _Input({}, []))
        own.photos |= {photo: Photo(photo) for photo in task.photos if photo not in own.photos}
        if task.prompt:
            own.prompts.append((task.prompt, task.prompt_name, task.seed, task.name))
    return found


def _is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of photos with face boxes; tasks have other columns."""
    if path.suffix.lower() not in (".jsonl", ".ndjson") or not path.is_file():
        return False
    try:
        return {"path", "bbox"} <= next(read_objects(path), {}).keys()
    except (ValueError, OSError):  # the reader of tasks says what is wrong
        return False


def _from_manifest(path: Path, root: Path | None) -> dict[str, _Input]:
    """People with at least two photos; the captions of their photos are the prompts."""
    found: dict[str, _Input] = defaultdict(lambda: _Input({}, []))
    for record in read_manifest(path, root)[0]:
        if record.identity is None:
            continue
        own = found[record.identity]
        own.photos[record.path] = Photo(record.path, record.bbox)
        if record.caption:
            own.prompts.append((record.caption, f"{len(own.prompts) + 1:02d}", None, None))
    return _with_pairs(found, f"{path}: no identity has", "identity.source of trainer.prepare says who is who")


def _from_folder(path: Path) -> dict[str, _Input]:
    """PPR10K's groups, or a sub-folder a person; without prompts."""
    files: dict[Path, list[Path]] = defaultdict(list)
    for folder, _, names in os.walk(path):
        if not Path(folder).name.startswith("masks"):  # PPR10K's are named as the photos are
            own = [Path(folder, name) for name in names if Path(name).suffix.lower() in PICTURES and name[0] != "."]
            files |= {Path(folder): own} if own else {}
    if not files:
        raise TrainerError(f"people {path}: neither {', '.join(KINDS)} files nor photos in this folder")
    grouped = {folder: own for folder, own in files.items() if all(GROUP.fullmatch(file.stem) for file in own)}
    found: dict[str, _Input] = defaultdict(lambda: _Input({}, []))
    if grouped:
        best = min(grouped, key=lambda folder: (_version(folder.relative_to(path)), folder))
        if len(grouped) > 1:
            logger.info("photos of %s; give another of the %d folders to take that", best, len(grouped))
        for group, _, file in sorted((*map(int, GROUP.fullmatch(file.stem).groups()), file) for file in grouped[best]):
            found[str(group)].photos[file] = Photo(file)
    else:
        for folder in sorted(files):
            for file in sorted(files[folder]):
                name = folder.relative_to(path).as_posix() if folder != path else file.stem
                found[name].photos[file] = Photo(file)
    return _with_pairs(found, f"people {path}: nobody has", "expected <group>_<index>.jpg, or a sub-folder a person")


def _version(folder: Path) -> tuple[int, ...]:
    """The held-out half of PPR10K before the other, 8-bit retouched photos before the 16-bit sources."""
    places = [_VERSIONS.index(part) for part in folder.parts if part in _VERSIONS]
    return tuple(places) or (len(_VERSIONS),)


def _with_pairs(found: Mapping[str, _Input], nobody: str, advice: str) -> dict[str, _Input]:
    """Those with at least two photos: with one there is nothing to tell how alike photos of the person are."""
    several = {name: own for name, own in found.items() if len(own.photos) > 1}
    if not several:
        raise TrainerError(f"{nobody} two photos or more; {advice}")
    if left_out := [name for name in found if name not in several]:
        logger.info("left out, with a single photo: %s", listing(left_out))
    return several


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that hold something.

    Raises:
        TrainerError: no such file, no UTF-8, no such line, or one that is longer than a prompt.
    """
    try:
        lines = [_TEXT.validate_python(line.strip()) for _, line in read_lines(path)]
    except ValidationError as error:
        raise TrainerError(f"prompts {path}: {explain(error.errors()[0])}") from error
    except (OSError, ValueError) as error:
        raise TrainerError(f"prompts {path}: {error}; expected a text file with a prompt a line") from error
    if not lines:
        raise TrainerError(f"prompts {path}: holds no prompts")
    return list(dict.fromkeys(lines))


def _requests(name: str, file: str, own: _Input, settings: EvaluateSettings) -> Iterator[Request]:
    """The pictures of a person: each prompt once with each seed, and none twice."""
    prompts: dict[str, list[tuple[str, int, str | None]]] = defaultdict(list)
    for prompt, place, seed, row in own.prompts:
        for one in settings.seeds if seed is None else [seed]:
            if all(one != known for _, known, _ in prompts[prompt]):
                prompts[prompt].append((place, one, row))
    taken: set[str] = set()
    for number, (prompt, made) in enumerate(list(prompts.items())[: settings.most_prompts], 1):
        for place, seed, row in made:
            shown = FORBIDDEN.sub("_", place)[:LONGEST_NAME] or f"{number:02d}"
            called = f"{file}_{shown}" + (f"_s{seed}" if len(made) > 1 else "")
            if called.casefold() in taken:  # a prompt may be called like another's number
                called = f"{file}_{number:02d}_{seed}_{len(taken)}"
            taken.add(called.casefold())
            yield Request(called, name, prompt, seed, row=row)


def all_requests(people: Sequence[Person]) -> list[Request]:
    """Everybody's."""
    return [request for person in people for request in person.requests]
