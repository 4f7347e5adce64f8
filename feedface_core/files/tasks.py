"""What to make, read from files: people × prompts (JSON), rows (JSON, JSONL, CSV), or the published evaluation format.

    {"people": [{"id": "anna", "photos": ["anna/1.jpg"]}], "prompts": ["a photo of …"], "seeds": [1, 2]}
    {"person": "anna", "photos": ["anna/1.jpg"], "prompt": "a photo of …", "seed": 1, "KSampler.steps": 20}
    {"id": "1433", "caption_list": ["a man …"], "source_group": [{"path": "data_examples/1433_0.jpg"}]}

In CSV a row has the second form, with several photos separated by ``|``. A photo may be a folder of photos. A name with
a dot is an input of the workflow: title of the node, dot, name of the input.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from ..errors import FeedFaceError, refuse, shorten
from .tables import first_repeated, read_records

LARGEST_SEED = 2**64 - 1
MOST_TASKS = 10**6
"""Pictures of one entry of people × prompts × seeds; at a second each they take twelve days."""
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


def whole_number(value: Any) -> Any:
    """What JSON or a cell has for one; Python and pydantic would read 1_0 as 10 as well."""
    if isinstance(value, bool) or (isinstance(value, str) and not re.fullmatch(r"\s*[+-]?[0-9]+(\.0*)?\s*", value)):
        raise ValueError("expected a whole number")
    return value


def seed_range(value: int) -> int:
    if not 0 <= value <= LARGEST_SEED:
        raise ValueError(f"expected 0 to {LARGEST_SEED}")
    return value


def as_list(value: Any) -> Any:
    """A cell of a table, or one photo, as a list."""
    return [part for part in value.split("|") if part.strip()] if isinstance(value, str) else value


def usable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("a text cannot hold the sign NUL")
    return value


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(usable)]
Seed = Annotated[int, BeforeValidator(whole_number), AfterValidator(seed_range)]
Photos = Annotated[tuple[Text, ...], BeforeValidator(as_list), Field(min_length=1)]
Value = Annotated[bool | int | float | str, AfterValidator(usable)]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, frozen=True)


class Row(Record):
    """A picture: a person, a prompt. Further names are inputs of the workflow."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Value] = Field(init=False)

    id: Text | None = None
    person: Text | None = None
    photos: Photos = ()
    prompt: Text | None = None
    seed: Seed | None = None


class Person(Record):
    id: Text
    photos: Photos


class Prompt(Record):
    text: Text
    id: Text | None = None


class Batch(Record):
    """Every person with every prompt and every seed."""

    people: Annotated[list[Person], Field(min_length=1)]
    prompts: Annotated[
        list[Annotated[Prompt, BeforeValidator(lambda value: {"text": value} if isinstance(value, str) else value)]],
        Field(min_length=1),
    ]
    seeds: tuple[Seed, ...] = ()
    settings: dict[Text, Value] = {}


class Source(Record):
    model_config = ConfigDict(extra="ignore")
    path: Text


class Released(Record):
    """A person of the published evaluation, with prompts of their own; other names than these are not used."""

    model_config = ConfigDict(extra="ignore")
    id: Text
    caption_list: Annotated[list[Text], Field(min_length=1)]
    source_group: Annotated[
        list[Annotated[Source, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)]],
        Field(min_length=1),
    ]


@dataclass(frozen=True)
class Task:
    """A picture to make.

    Attributes:
        where: file and row that ask for it.
        name: of its own, or None.
        prompt_name: of the prompt among those of the person, for the name of the picture; empty for a row.
        folder: where the photos lie that the settings name.
        settings: values by ``"Title.input"``.
    """

    where: str
    name: str | None = None
    person: str | None = None
    photos: tuple[Path, ...] = ()
    prompt: str | None = None
    prompt_name: str = ""
    seed: int | None = None
    folder: Path = Path()
    settings: dict[str, Any] = field(default_factory=dict)


def read_tasks(paths: list[Path], photo_folder: Path | None = None) -> list[Task]:
    """The tasks of files, or of the JSON, JSONL and CSV files in folders, in order.

    Args:
        photo_folder: where the photos lie that the files name; None is the folder of each file.

    Raises:
        FeedFaceError: something cannot be read or is missing; the first ten problems, each with file and row.
    """
    tasks, problems, known = [], [], {}
    for path in paths:
        for where, value in read_records(path):
            try:
                made = list(tasks_of(where, value, photo_folder or Path(where.file).parent))
            except FeedFaceError as problem:
                problems += str(problem).split("\n")
                continue
            tasks += made
            if not isinstance(value, dict) or not {"people", "caption_list"} & value.keys():
                continue
            for person in dict.fromkeys(task.person for task in made):
                if known.setdefault(person, str(where)) != str(where):
                    problems.append(f"{where}: person {person!r} is there twice, first in {known[person]}: rename one")
    refuse(problems)
    return tasks


def tasks_of(where: Any, value: Any, folder: Path) -> Iterator[Task]:
    """The tasks of one record. Raises ``FeedFaceError``, a line for each problem."""
    if not isinstance(value, dict):
        raise FeedFaceError(f"{where}: expected an object with names and values, found {shorten(value)}")
    if "caption_list" in value or "source_group" in value:
        record = validated(Released, value, where)
        photos = photos_of(where, [source.path for source in record.source_group], folder, by_name=True)
        for number, caption in enumerate(record.caption_list, 1):
            yield Task(
                f"{where}: caption_list[{number - 1}]", None, record.id, photos, caption, f"{number:02d}", folder=folder
            )
    elif "people" in value or "prompts" in value:
        yield from product(where, validated(Batch, value, where), folder)
    else:
        yield row_task(where, validated(Row, value, where), folder)


def product(where: Any, batch: Batch, folder: Path) -> Iterator[Task]:
    count = len(batch.people) * len(batch.prompts) * max(len(batch.seeds), 1)
    if count > MOST_TASKS:
        raise FeedFaceError(f"{where}: people × prompts × seeds are {count:,} pictures, at most {MOST_TASKS:,}")
    twice = first_repeated([person.id for person in batch.people])
    refuse([f"{where}: people: id {shorten(twice)} is there twice"] if twice is not None else [])
    problems, photos = [], {}
    for index, person in enumerate(batch.people):
        try:
            photos[person.id] = photos_of(f"{where}: people[{index}]", person.photos, folder)
        except FeedFaceError as problem:
            problems.append(str(problem))
    refuse(problems)
    for person in batch.people:
        for number, prompt in enumerate(batch.prompts, 1):
            task = Task(
                f"{where}: person {person.id}, prompts[{number - 1}]",
                None,
                person.id,
                photos[person.id],
                prompt.text,
                prompt.id or f"{number:02d}",
                folder=folder,
                settings=batch.settings,
            )
            yield from (replace(task, seed=seed) for seed in batch.seeds or (None,))


def row_task(where: Any, row: Row, folder: Path) -> Task:
    fields = list(Row.model_fields)
    for name in row.model_extra:
        if "." not in name:
            near = get_close_matches(name, fields, 1)
            meant = f" (is {near[0]!r} meant?)" if near else ""
            raise FeedFaceError(
                f"{where}: no column {shorten(name)} is known{meant}: there are {', '.join(fields)}, and inputs of the "
                "workflow, such as 'KSampler.steps'"
            )
    if not (row.photos or row.prompt or row.model_extra):
        raise FeedFaceError(f"{where}: nothing to make: give photos, a prompt, or both")
    photos = photos_of(where, row.photos, folder) if row.photos else ()
    return Task(str(where), row.id, row.person, photos, row.prompt, "", row.seed, folder, row.model_extra)


def photos_of(where: Any, named: list[str] | tuple[str, ...], folder: Path, by_name: bool = False) -> tuple[Path, ...]:
    """The files of photos, those of a folder in the order of their names.

    Args:
        by_name: a photo may also lie in the folder itself, without the folders that its path names.

    Raises:
        FeedFaceError: one is missing.
    """
    found, problems, prefix = [], [], f"{where}: " if where else ""
    for name in named:
        places = [folder / name, *([folder / Path(name).name] if by_name else [])]
        place = next((place for place in places if os.path.exists(place)), None)
        if place is None:
            looked = " and ".join(str(place)[:200] for place in dict.fromkeys(places))
            problems.append(
                f"{prefix}no photo {shorten(name)}: looked for {looked}; mend the path, or name the folder: --photos"
            )
        elif place.is_dir():
            try:
                inside = sorted(file for file in place.iterdir() if file.suffix.lower() in PICTURES)
            except OSError as problem:
                problems.append(f"{prefix}the folder {place} cannot be read: {problem.strerror}")
                continue
            found += inside
            if not inside:
                problems.append(f"{prefix}no photos in the folder {place} ({', '.join(sorted(PICTURES))})")
        else:
            found.append(place)
    refuse(problems)
    return tuple(found)


def validated(kind: Callable[..., Any], value: dict[str, Any], where: Any) -> Any:
    try:
        return kind(**value)
    except ValidationError as problem:
        raise FeedFaceError("\n".join(f"{where}: {explain(one)}" for one in problem.errors()[:5])) from None
    except TypeError as problem:  # a name that is no word
        raise FeedFaceError(f"{where}: {problem}") from None


def explain(problem: Any) -> str:
    """One of pydantic's ``errors()``: the name, what is wrong, and what was found."""
    place = ".".join(str(part)[:80] for part in problem["loc"] if part not in ("bool", "int", "float", "str"))
    if problem["type"] == "missing":
        return f"{place} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{place} is not known here: remove it, or mend the name"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}, found {shorten(problem['input'])}"
