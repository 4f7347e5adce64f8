"""Settings read from YAML files and dotted overrides, closed to unknown names.

The machinery only; the settings of training are in :mod:`trainer.config`, those of preparing photos in
:mod:`trainer.preparation.settings`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from .errors import TrainerError

AnySettings = TypeVar("AnySettings", bound="Settings")


class ConfigError(TrainerError):
    """A setting that does not exist, or whose value cannot be used."""


class Settings(BaseModel):
    """Base of every group of settings: immutable, and closed to unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def to_json(self) -> str:
        """The settings, defaults included, as one JSON object."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The settings that :meth:`to_json` wrote.

        Raises:
            ConfigError: for a setting that does not exist or a value that does not fit.
        """
        return build(cls, json.loads(text), "JSON")


class _Loader(yaml.SafeLoader):
    """YAML as people mean it in settings: ``off`` and ``no`` are words, and a key is text even if it is ``null``."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Plain values of a YAML text. Raises ``yaml.YAMLError``."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 — derived from SafeLoader


def load(
    kind: type[AnySettings],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> AnySettings:
    """Read a YAML file and apply dotted overrides.

    Args:
        kind: the class of settings to build.
        path: the YAML file; None starts from an empty one.
        overrides: assignments such as ``train.steps=100``; the value is YAML, such as ``[1, 2]`` or ``null``.
        given: values as they are, which come before everything else.

    Raises:
        ConfigError: a file that is missing or no YAML mapping, a setting that does not exist (with the
            nearest name), a value that does not fit.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = read_yaml(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the configuration ({error.strerror})") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected sections with settings, found a {type(values).__name__}")
        _fill_empty_sections(kind, values)
        _refuse_unknown(kind, values, str(path))
    for override in overrides:
        _apply_override(kind, values, override)
    values |= given or {}
    source = " with ".join(part for part in (str(path or ""), "overrides" if overrides else "") if part)
    return build(kind, values, source or "defaults")


def build(kind: type[AnySettings], values: Mapping[str, Any], source: str) -> AnySettings:
    """Make settings of plain values, with errors that name the setting and what was found.

    Raises:
        ConfigError: for a setting that does not exist or a value that does not fit.
    """
    _refuse_unknown(kind, values, source)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if problem["type"] in ("missing", "value_error") else f", found {problem['input']!r}"
            lines.append(f"  {name + ': ' if name else ''}{message}{found}")
        raise ConfigError(f"{source}: settings that cannot be used:\n" + "\n".join(lines)) from None


def setting_names(kind: type[Settings], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a class, in their order."""
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            yield prefix + name
        else:
            yield from setting_names(section, f"{prefix}{name}.")


def describe(kind: type[Settings], prefix: str = "") -> str:
    """Every setting with its default and meaning, for ``--help``."""
    lines = []
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            lines.append(describe(section, f"{prefix}{name}."))
            continue
        default = "required"
        if not field.is_required():
            default = json.dumps(field.get_default(call_default_factory=True))
        lines.append(f"  {prefix + name}: {default}")
        if field.description:
            lines.append(f"      {' '.join(field.description.split())}")
    return "\n".join(lines)


def _section(annotation: Any) -> type[Settings] | None:
    """The class of settings behind an annotation, if it is a section."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Settings):
            return candidate
    return None


def _fill_empty_sections(kind: type[Settings], values: dict[str, Any]) -> None:
    """A section whose settings are all commented out is None in YAML: it means the defaults."""
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        if section is None or name not in values:
            continue
        if values[name] is None:
            values[name] = {}
        elif isinstance(values[name], dict):
            _fill_empty_sections(section, values[name])


def _refuse_unknown(root: type[Settings], values: Mapping[str, Any], source: str) -> None:
    def visit(kind: type[Settings], part: Mapping[str, Any], prefix: str) -> None:
        for name, value in part.items():
            if name not in kind.model_fields:
                hint = _nearest(root, [prefix + field for field in kind.model_fields], prefix, str(name))
                raise ConfigError(f"{source}: there is no setting {prefix}{name}{hint}")
            section = _section(kind.model_fields[name].annotation)
            if section is not None and isinstance(value, Mapping):
                visit(section, value, f"{prefix}{name}.")

    visit(root, values, "")


def _nearest(root: type[Settings], known: Sequence[str], prefix: str, name: str) -> str:
    """What the user may have meant: a name of this section, or the same name in another one."""
    everywhere = list(setting_names(root))
    near = difflib.get_close_matches(prefix + name, known, n=1, cutoff=0.6)
    near = near or [full for full in everywhere if full.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(prefix + name, everywhere, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return "; known here: " + ", ".join(known)


def _apply_override(kind: type[Settings], values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: expected name=value, such as train.steps=100")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    nested: Any = value
    for name in reversed(path.split(".")):
        nested = {name: nested}
    _refuse_unknown(kind, nested, f"override {override!r}")
    target, section = values, kind
    *parents, leaf = path.split(".")
    for name in parents:
        section = _section(section.model_fields[name].annotation)
        if section is None:
            raise ConfigError(f"override {override!r}: {name} is a setting, not a section")
        if not isinstance(target.get(name), dict):
            target[name] = {}
        target = target[name]
    target[leaf] = value
