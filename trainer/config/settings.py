"""How settings are read: YAML files and dotted overrides, through pydantic-settings."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, SettingsConfigDict
from typing_extensions import Self

from feedface_core.errors import shorten

from ..errors import TrainerError, explain, first_of
from .fields import as_path

logger = logging.getLogger(__name__)

MOST_BYTES = 2**17
"""Of a YAML file or an override: the reader takes seconds for a megabyte."""
_CLOSED = {"extra": "forbid", "frozen": True, "strict": True, "use_attribute_docstrings": True, "allow_inf_nan": False}


class Section(BaseModel):
    """A group of settings: immutable, and closed to unknown names."""

    model_config = ConfigDict(**_CLOSED)


class Settings(BaseSettings):
    """All settings of a command."""

    model_config = SettingsConfigDict(**_CLOSED)

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, **_):
        """What the constructor is given, then ``file``, a file's values; neither the environment nor secrets."""
        return init_settings, InitSettingsSource(settings_cls, init_settings.init_kwargs.pop("file", {}))

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = (), **values: Any) -> Self:
        """The settings of a YAML file, changed by overrides.

        Args:
            path: the file; None starts from nothing.
            overrides: assignments such as ``train.steps=100``; the value is YAML, such as ``[1, 2]`` or ``null``.
            values: sections or settings by name, which come before everything else.

        Raises:
            TrainerError: a file that is missing or no YAML mapping, a setting that does not exist (with the nearest
                name), a value that does not fit.
        """
        file = {} if path is None else _read_file(as_path(path, "configuration"))
        assigned: dict[str, Any] = {}
        for override in overrides:
            _assign(assigned, override)
        for name in assigned.keys() & values.keys():
            raise TrainerError(f"{name} is given twice, as {shorten(values[name])} and {shorten(assigned[name])}")
        return cls._make(path or "settings", assigned | values, file)

    @classmethod
    def _make(cls, source: str | Path, values: dict[str, Any], file: dict[Any, Any] | None = None) -> Self:
        for name in [*values, *(file or ())]:  # pydantic-settings has options of its own behind some names
            if name not in cls.model_fields:
                raise TrainerError(f"{source}: {cls._unknown((name,))}")
        try:
            return cls(file=file or {}, **values)
        except ValidationError as error:
            found = error.errors()
            unknown = [problem["loc"] for problem in found if problem["type"] == "extra_forbidden"]
            lines = map(cls._unknown, unknown) if unknown else map(explain, found)
            raise TrainerError(f"{source}:{first_of(lines, len(unknown or found))}") from None

    def to_json(self) -> str:
        """The settings, defaults included, as one JSON object."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The settings that :meth:`to_json` wrote, in this version or an older one: those that no longer exist are left
        out with a warning.

        Raises:
            TrainerError: as :meth:`load`.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TrainerError(f"the configuration is not JSON: {error}; found {shorten(text)}") from error
        if not isinstance(values, dict):
            raise TrainerError(f"the configuration: expected sections with settings, found {shorten(values)}")
        former = []
        if values.keys() <= cls.model_fields.keys():  # else it is no configuration of ours, as _make says
            try:
                return cls(**values)
            except ValidationError as error:
                former = [one["loc"] for one in error.errors() if one["type"] == "extra_forbidden"]
        for *sections, name in former:
            del reduce(dict.__getitem__, sections, values)[name]
            logger.warning("left out the former setting %s", ".".join((*sections, name)))
        return cls._make("the configuration", values)

    @classmethod
    def describe(cls) -> str:
        """Every setting with its default and meaning, for ``--help``."""
        lines = []
        for name, field in list_settings(cls):
            default = "required" if field.is_required() else json.dumps(field.default)
            lines += [f"  {name}: {default}", *([f"      {field.description}"] if field.description else [])]
        return "\n".join(" ".join(line.splitlines()) for line in lines)

    @classmethod
    def _unknown(cls, loc: tuple[str | int, ...]) -> str:
        name, known = ".".join(map(str, loc))[:80], [*cls.model_fields, *(full for full, _ in list_settings(cls))]
        # The same name in another section, or one that is spelt alike.
        near = [full for full in known if full.rpartition(".")[2] == name.rpartition(".")[2]]
        near = near or difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(cls.model_fields)
        return f"there is no setting {shorten(name)[1:-1]}; {hint}"


def list_settings(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of every setting, in order."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from list_settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _assign(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    names = name.split(".")
    if not equals or not all(names) or len(names) > 8:
        raise TrainerError(f"{shorten(override)}: expected name=value, such as train.steps=100")
    for section in names[:-1]:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise TrainerError(f"{shorten(override)}: {section} is given already, as {shorten(values)}")
    if names[-1] in values:
        raise TrainerError(f"{shorten(override)}: {name} is given twice; before it was {shorten(values[names[-1]])}")
    values[names[-1]] = _read_yaml(text, shorten(override))


def _read_file(path: Path) -> dict[Any, Any]:
    if not os.path.isfile(path):
        raise TrainerError(f"{path}: cannot read the configuration: no such file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrainerError(f"{path}: cannot read the configuration: {error.strerror}") from error
    values = _read_yaml(content, path) or {}
    if not isinstance(values, dict):
        raise TrainerError(
            f"{path}: expected sections with settings, found a {type(values).__name__}, {shorten(values)}"
        )
    # A section whose settings are all commented out is None: it means the defaults.
    return {name: value for name, value in values.items() if value is not None}


class _Loader(yaml.SafeLoader):
    """YAML without aliases, whose copies of copies fill any memory, and without a key that is there twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read: write the value out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if str(key.value) in names:
                text = f"{shorten(key.value)[1:-1]} is there twice"
                raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, takes 2e-5 for a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(text: str | bytes, source: str | Path) -> Any:
    if len(text) > MOST_BYTES:
        raise TrainerError(f"{source}: {len(text)} bytes are too many for settings, at most {MOST_BYTES}")
    try:
        return yaml.load(text, _Loader)  # derived from SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TrainerError(f"{source}: not valid YAML: {str(error)[:400]}") from error
