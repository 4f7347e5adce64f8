"""Configurations that are wrong in one place each: settings, YAML files, overrides, and the JSON of checkpoints."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.refused import refused

from trainer.config import Config, PrepareSettings
from trainer.config.settings import list_settings
from trainer.errors import TrainerError

GOOD = {
    "model": {"base": "base"},
    "adapter": {"encoder": {"path": "clip"}},
    "data": {"manifest": "manifest.jsonl"},
    "train": {"output": "run"},
}
PHOTOS = {"photos": "photos", "output": "dataset"}
NAN, INF = float("nan"), float("inf")

WHOLE = ["text", "12", True, [], {"a": 1}, 2.5, NAN, INF, 10**30, -(10**30), 10**400]
NUMBER = ["text", "1.5", True, [], {"a": 1}, NAN, INF, -INF, 1e308, -1e308, 10**400]
TEXT = [5, True, ["a", [1]], {"a": 1}, "lone \ud800 surrogate", "x" * 100_000]
PATH = [*TEXT, "", "  ", "a\0b", "x" * 5000, "x/" * 5000, "y" * 300, "~nobody-of-that-name/x"]
SWITCH = ["no", "text", 1, 0.0, [], {}]
CHOICE = ["other", "", 3, True, ["a", "b"], {"a": 1}]

#: Settings that are text but no path; every other text is a path.
NO_PATHS = {"adapter.title", "adapter.encoder.name", "caption.prompt", "identity.pattern", "detect.model",
    "detect.device",
            "mask.device", "caption.device", "licence.adapter", "licence.base", "licence.encoder", "consent",
            "optimiser.name"}  # fmt: skip
REQUIRED = {"model.base", "data.manifest", "train.output", "photos", "output"}


def kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of; those of its elements are left out."""
    if get_origin(annotation) is Literal:
        return {Literal}
    if get_origin(annotation) in (types.UnionType, Union):
        return set().union(*map(kinds, get_args(annotation)))
    if hasattr(annotation, "__metadata__"):
        return kinds(annotation.__origin__)
    return {get_origin(annotation) or annotation}


def bad_values(name: str, annotation: Any) -> list[Any]:
    """What a setting of a type must not accept."""
    own = kinds(annotation)
    values = [] if type(None) in own else [None]
    if own & {tuple}:
        return [*values, "text", 5, [], [1], [0.5] * 9, [NAN] * 3, [INF, 0, 0], ["a", "b", "c"], {"a": 1}, [True] * 3]
    if own & {list}:
        return [*values, 5, True, {"a": 1}, [[]], [None], [{}], [NAN], ["\ud800"], ["a"] * 20_000]
    if own & {dict}:
        return [*values, "text", 5, True, ["a"], {"a": []}, {"a": "\ud800"}, {5: 1}, {"x" * 10_000: 1}]
    if own & {Literal}:
        return [*values, *CHOICE]
    if own & {bool}:
        return [*values, *SWITCH]
    if own & {float}:
        return [*values, *NUMBER]
    if own & {int}:
        return [*values, *WHOLE]
    return [*values, *(TEXT if name in NO_PATHS else PATH)]


CASES = [
    pytest.param(cls, base, name, value, id=f"{cls.__name__}-{name}-{str(value)[:20]!r}-{number}")
    for cls, base in ((Config, GOOD), (PrepareSettings, PHOTOS))
    for name, field in list_settings(cls)
    for number, value in enumerate(bad_values(name, field.annotation))
]


def put(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy with one setting changed, by its dotted name."""
    first, _, rest = name.partition(".")
    return {**values, first: put(values.get(first, {}), rest, value) if rest else value}


@pytest.mark.parametrize(("cls", "base", "name", "value"), CASES)
def test_value_of_another_type_or_size(cls, base, name, value) -> None:
    refused(lambda: cls.load(**put(base, name, value)), name, error=TrainerError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimiser.betas", [1, 1]),
        ("optimiser.betas", [0.9, 1.0]),
        ("optimiser.betas", [-0.1, 0.9]),
        ("optimiser.eps", 0),
        ("optimiser.lr", 0),
        ("optimiser.lr", 1e6),
        ("optimiser.accumulation", 0),
        ("optimiser.clip", -1),
        ("adapter.encoder.image_std", [0, 0, 0]),
        ("adapter.encoder.image_std", [0.5, -0.5, 0.5]),
        ("adapter.encoder.image_std", [1e-320, 0.5, 0.5]),
        ("adapter.encoder.image_mean", [1e30, 0.5, 0.5]),
        ("adapter.encoder.image_size", 0),
        ("adapter.encoder.image_size", 100_000),
        ("adapter.encoder.layer", 10**9),
        ("adapter.depth", 10**6),
        ("adapter.depth", 0),
        ("adapter.heads", 10**6),
        ("adapter.context_width", 10**9),
        ("adapter.sites", []),
        ("adapter.sites", ["a", "a"]),
        ("adapter.sites", [""]),
        ("adapter.sites", [f"site {number}" for number in range(50_000)]),
        ("adapter.sites", "some"),
        ("data.manifest", []),
        ("data.manifest", ""),
        ("data.manifest", ["a.jsonl", "a.jsonl"]),
        ("data.manifest", ["a.jsonl", ""]),
        ("data.resolution", 10**6),
        ("data.resolution", 100),
        ("data.repeat", 10**9),
        ("data.workers", 10**6),
        ("data.cache_batch", 10**9),
        ("data.augment_variants", 10**7),
        ("train.output", ""),
        ("train.output", "   "),
        ("train.output", "a\0b"),
        ("train.seed", 10**30),
        ("train.seed", 2**64),
        ("train.steps", 10**15),
        ("train.batch_size", 10**9),
        ("train.timeout_minutes", 1e300),
        ("train.timeout_minutes", 1e-9),
        ("train.ema", 1),
        ("validation.prompts", []),
        ("validation.prompts", ["a"] * 10_000),
        ("validation.seeds", []),
        ("validation.seeds", [10**30]),
        ("validation.seeds", [1.5]),
        ("validation.face_scale", NAN),
        ("validation.text_scale", INF),
        ("validation.both_scale", 1e308),
        ("validation.strength", 1e308),
        ("validation.size", 10**6),
        ("validation.steps", 10**6),
        ("validation.references", ["a.png", "a\0b.png"]),
        ("loss.min_snr_gamma", 1e308),
        ("loss.identity.weight", -1),
        ("loss.identity.weight", NAN),
        ("loss.identity.contrastive", 1e308),
        ("loss.identity.temperature", 0),
        ("loss.identity.below", 1.5),
        ("loss.identity.recogniser", "examiner"),
        ("loss.identity.path", "a\0b"),
    ],
)
def test_value_out_of_range(name, value) -> None:
    refused(lambda: Config.load(**put(GOOD, name, value)), name, error=TrainerError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop.size", 100_000),
        ("crop.size", 1),
        ("crop.scale", 1e6),
        ("crop.scale", 0.5),
        ("detect.device", "abacus"),
        ("detect.device", "cuda:99"),
        ("detect.device", "meta"),
        ("mask.device", "gpu"),
        ("caption.device", ""),
        ("detect.threshold", 0),
        ("detect.insightface_roots", ["a\0b"]),
        ("mask.parser_roots", ["~nobody-of-that-name/x"]),
        ("sheet", 10**6),
        ("workers", 10**6),
        ("batch_size", 10**9),
        ("caption.most_tokens", 10**9),
        ("identity.pattern", "(["),
        ("identity.pattern", "no group"),
        ("identity.pattern", ""),
        ("identity.pattern", "(a)" * 5000),
        ("identity.pattern", "(" * 500 + ")" * 500),
        ("photos", ""),
        ("output", ""),
    ],
)
def test_prepare_value_out_of_range(name, value) -> None:
    refused(lambda: PrepareSettings.load(**put(PHOTOS, name, value)), name, error=TrainerError)


def test_source_of_the_identity_needs_its_pattern() -> None:
    refused(lambda: PrepareSettings.load(**put(PHOTOS, "identity.source", "pattern")), "identity.pattern")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
FILES = {
    "tag": b"train: !!python/object/apply:os.system ['true']\n",
    "tag of a class": b"train: !!python/name:os.system\n",
    "unknown tag": b"train: !thing {steps: 3}\n",
    "anchors that multiply": BOMB.encode(),
    "anchor into a setting": BOMB.encode() + b"model: {base: *j}\n",
    "anchor of itself": b"train: &t {steps: *t}\n",
    "5000 digits": b"train: {steps: " + b"9" * 5000 + b"}\n",
    "5000 digits in a text setting": b"model: {base: " + b"9" * 5000 + b"}\n",
    "digits in base 60": b"train: {steps: 1" + b":59" * 400 + b"}\n",
    "deep flow": b"train: " + b"[" * 100_000,
    "deep mapping": b"train: " + b"{a: " * 20_000,
    "deep blocks": b"".join(b" " * n + b"a:\n" for n in range(1500)),
    "NUL": b"train:\n  output: a\0b\n",
    "UTF-16": "train: {steps: 3}\n".encode("utf-16-le"),
    "Latin-1": "train: {output: é}\n".encode("latin-1"),
    "picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "two documents": b"train: {steps: 3}\n---\ntrain: {steps: 4}\n",
    "tabs": b"train:\n\tsteps: 3\n",
    "date": b"train: {steps: 2024-99-99}\n",
    "binary": b"model: {base: !!binary '###'}\n",
    "list": b"- train\n",
    "text": b"just text\n",
    "number": b"5\n",
    "nothing": b"",
    "comments": b"# all settings are commented out\n",
    "numbered section": b"1: {steps: 3}\n",
    "null section": b"null: {steps: 3}\n",
    "list as a name": b"? [a, b]\n: 3\n",
    "mapping as a name": b"? {a: b}\n: 3\n",
    "section that is a number": b"train: 5\n",
    "section that is a list": b"train: [1, 2]\n",
    "numbered setting": b"train: {1: 3}\n",
    "setting twice": b"train: {steps: 1, steps: 2}\n",
    "section twice": b"train: {steps: 1}\ndata: {repeat: 1}\ntrain: {seed: 2}\n",
    "option of the reader": b"_env_file: /etc/passwd\n",
    "option of the reader, too": b"yaml_file: other.yaml\n",
    "itself": b"self: 3\n",
    "argument": b"path: other.yaml\n",
    "unknown": b"trian: {steps: 3}\n",
    "unknown with a long name": b"'" + b"x" * 50_000 + b"': 3\n",
    "surrogate": b'model: {base: "\\ud800"}\n',
    "two megabytes": b"# " + b"x" * 2**21,
    "a million names": b"train: {" + b",".join(b"a%d: 1" % number for number in range(100_000)) + b"}\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
@pytest.mark.parametrize("cls", [Config, PrepareSettings])
def test_yaml_file(cls, content, tmp_path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    refused(lambda: cls.load(path), path, error=TrainerError)


@pytest.mark.parametrize(
    "path", ["gone.yaml", "", ".", "/", "a\0b.yaml", "x" * 5000 + ".yaml", "~nobody-of-that-name/x.yaml", "\ud800.yaml"]
)
def test_path_of_the_file(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: Config.load(path), "configuration", error=TrainerError)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("", "name=value"),
        ("=", "name=value"),
        ("=5", "name=value"),
        ("train.steps", "train.steps"),
        ("train..steps=3", "train..steps"),
        (".steps=3", ".steps"),
        ("train.=3", "train."),
        ("train.steps.=3", "train.steps"),
        ("train.steps.a.b.c=3", "train.steps"),
        ("train.steps=!!python/name:os.system", "train.steps"),
        ("train.steps=" + "9" * 5000, "train.steps"),
        ("train.steps=" + "[" * 5000, "train.steps"),
        ("train.steps=[1", "train.steps"),
        ("train.steps=\0", "train.steps"),
        ("train.steps=", "train.steps"),
        ("train.steps=null", "train.steps"),
        ("train.steps=2024-99-99", "train.steps"),
        ("train={steps: 1, steps: 2}", "steps"),
        ("train=5", "train"),
        ("_env_file=/etc/passwd", "_env_file"),
        ("_secrets_dir=/etc", "_secrets_dir"),
        ("yaml_file=other.yaml", "yaml_file"),
        ("__class__=3", "__class__"),
        ("self=3", "self"),
        ("path=3", "path"),
        ("train.model_config=3", "train.model_config"),
        ("train.__dict__=3", "train.__dict__"),
        ("x" * 50_000 + "=3", "xxx"),
        ("a." * 5000 + "a=3", "a.a"),
        ("train.steps=&a [*a, *a]", "train.steps"),
        ("train.\ud800=3", "train"),
    ],
)
def test_override(override, named, tmp_path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(json.dumps(GOOD))
    assert Config.load(path).train.output == "run"
    refused(lambda: Config.load(path, [override]), named, error=TrainerError)


def test_the_same_setting_twice_on_the_command_line() -> None:
    refused(lambda: PrepareSettings.load(None, ["sheet=1", "sheet=2"], **PHOTOS), "sheet", error=TrainerError)


@pytest.mark.parametrize(
    "text",
    ["", "{", "5", "null", "[]", '"text"', "{}", "[" * 100_000, '{"path": "/etc/passwd"}', '{"overrides": ["a"]}',
     '{"_env_file": "x"}', '{"train": {"steps": ' + "9" * 5000 + "}}", '{"train": {"steps": NaN}}', "\ud800",
     json.dumps(GOOD)[:-1], json.dumps({**GOOD, "train": None}), json.dumps({**GOOD, "more": 1})],
)  # fmt: skip
def test_json_of_a_checkpoint(text) -> None:
    refused(lambda: Config.from_json(text), error=TrainerError)


# Whatever comes in.

many = hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 0.5, -1, 2**63, 10**400, 1e308, -1e-320, NAN, INF])
leaves = st.none() | st.booleans() | numbers | st.text(max_size=20) | st.sampled_from(["\ud800", "a\0b", "~nobody/x"])
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def sound(config: Any) -> None:
    """A configuration that was accepted survives its JSON, and holds nothing that is not finite."""
    text = config.to_json()
    assert type(config).from_json(text) == config
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the configuration"))
    text.encode()


def accepted_or_refused(call: Any, *named: object) -> None:
    """A sound configuration, or an error of the trainer that names what is wrong."""
    try:
        config = call()
    except TrainerError as error:
        assert all(str(name) in str(error) for name in named) and len(str(error)) < 1500
    else:
        sound(config)


@many
@given(st.sampled_from([name for name, _ in list_settings(Config)]), trees)
def test_any_value_of_any_setting(name: str, value: Any) -> None:
    accepted_or_refused(lambda: Config.load(**put(GOOD, name, value)), name.split(".")[0])


@many
@given(st.sampled_from([name for name, _ in list_settings(PrepareSettings)]), trees)
def test_any_value_of_any_prepare_setting(name: str, value: Any) -> None:
    accepted_or_refused(lambda: PrepareSettings.load(**put(PHOTOS, name, value)), name.split(".")[0])


@many
@given(st.dictionaries(st.sampled_from([*Config.model_fields, "more", "_env_file", "self"]), trees, max_size=4))
def test_any_sections(values: dict[str, Any]) -> None:
    accepted_or_refused(lambda: Config.from_json(json.dumps({**GOOD, **values})))


@many
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file(tmp_path_factory, content: bytes) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "any.yaml"
    path.write_bytes(content)
    accepted_or_refused(lambda: Config.load(path), path)


@many
@given(st.text(max_size=40), st.sampled_from(["", "train.steps=", "data.", "adapter.sites=", "validation.prompts=["]))
def test_any_override(text: str, start: str) -> None:
    accepted_or_refused(lambda: PrepareSettings.load(None, [start + text], **PHOTOS))
