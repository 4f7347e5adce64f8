"""How settings are read: YAML files and dotted overrides, through pydantic-settings."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict, YamlConfigSettingsSource
from typing_extensions import Self

from ..errors import TrainerError, explain, first_of

logger = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
_CLOSED = {"extra": "forbid", "frozen": True, "use_attribute_docstrings": True, "allow_inf_nan": False}


class Section(BaseModel):
    """A group of settings: immutable, and closed to unknown names."""

    model_config = ConfigDict(**_CLOSED)


class Settings(BaseSettings):
    """All settings of a command."""

    model_config = SettingsConfigDict(**_CLOSED)

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, **_):
        """What the constructor is given, then the file ``yaml_file``; neither the environment nor secrets."""
        return init_settings, _YamlFile(settings_cls, init_settings.init_kwargs.pop("yaml_file", None))

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
        if path is not None and not Path(path).is_file():
            raise TrainerError(f"{path}: cannot read the configuration: no such file")
        assigned: dict[str, Any] = {}
        for override in overrides:
            _assign(assigned, override)
        try:
            return cls(yaml_file=path, **assigned | values)
        except ValidationError as error:
            problems = error.errors()
            unknown = [cls._unknown(problem["loc"]) for problem in problems if problem["type"] == "extra_forbidden"]
            raise TrainerError(f"{path or 'settings'}:{first_of(unknown or [*map(explain, problems)])}") from None

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
        values, unknown = json.loads(text), []
        try:
            return cls(**values)
        except ValidationError as error:
            unknown = [problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"]
        for *sections, name in unknown:
            del reduce(dict.__getitem__, sections, values)[name]
            logger.warning("left out the former setting %s", ".".join((*sections, name)))
        return cls.load(**values)

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
        name, known = ".".join(map(str, loc)), [*cls.model_fields, *(full for full, _ in list_settings(cls))]
        # The same name in another section, or one that is spelt alike.
        near = [full for full in known if full.rpartition(".")[2] == name.rpartition(".")[2]]
        near = near or difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(cls.model_fields)
        return f"there is no setting {name}; {hint}"


def list_settings(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of every setting, in order."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from list_settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _assign(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise TrainerError(f"{override!r}: expected name=value, such as train.steps=100")
    *sections, leaf = name.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[leaf] = _read_yaml(text, override)


class _YamlFile(YamlConfigSettingsSource):
    def _read_file(self, file_path: Path) -> dict[str, Any]:
        values = _read_yaml(file_path.read_bytes(), file_path) or {}
        if not isinstance(values, dict):
            raise TrainerError(f"{file_path}: expected sections with settings, found a {type(values).__name__}")
        # A section whose settings are all commented out is None: it means the defaults.
        return {name: value for name, value in values.items() if value is not None}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str | bytes, source: str | Path) -> Any:
    try:
        return yaml.load(text, _Loader)  # derived from SafeLoader
    except yaml.YAMLError as error:
        raise TrainerError(f"{source}: not valid YAML: {error}") from error
