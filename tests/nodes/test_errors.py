"""How ComfyUI shows the errors of this pack: by the name of the class alone."""

from __future__ import annotations

import importlib
import pickle
import pkgutil

import pytest

from feedface_core.errors import FeedFaceError


@pytest.fixture
def error_classes(comfy) -> set[type[Exception]]:
    """Every class of error in a module of the pack, those of modules that are imported late included."""
    packages = [comfy.module("feedface_core"), comfy.module("nodes")]
    names = [
        module.name
        for package in packages
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    return {value for value in values if isinstance(value, type) and issubclass(value, Exception)}


def test_errors_are_shown_without_the_path_of_their_module(comfy, error_classes) -> None:
    """ComfyUI leaves the module out for built-in classes, and writes it before the name of all others."""
    pack = comfy.pack.__name__
    assert [kind for kind in error_classes if kind.__module__.startswith(pack)] == []
    common = comfy.module("feedface_core.errors").FeedFaceError
    ours = {kind.__name__ for kind in error_classes if issubclass(kind, common)}
    assert {"FeedFaceError", "NoFaceError", "DetectorUnavailable"} <= ours
    assert all(kind.__module__ == "builtins" for kind in error_classes if issubclass(kind, common))


def test_errors_of_the_trainer_keep_their_module() -> None:
    """Its workers send them to one another by module and name; ComfyUI has a copy of its own."""
    assert FeedFaceError.__module__ == "feedface_core.errors"
    assert isinstance(pickle.loads(pickle.dumps(FeedFaceError("no face"))), FeedFaceError)
