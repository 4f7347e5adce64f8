"""What enters a node, checked against its schema: inputs can be wired to any node, and then nobody else looks."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..feedface_core.conditioning import Face, People
from ..feedface_core.errors import FeedFaceError, shorten
from ..feedface_core.schedule import Schedule
from .adapter import LoadedAdapter

#: What the sockets carry that hold one object.
_CLASSES = {"MODEL": ModelPatcher, "FEEDFACE_ADAPTER": LoadedAdapter, "FEEDFACE_FACE": (Face, People)}
_CLASSES |= {"FEEDFACE_SCHEDULE": Schedule}
_SOCKETS = {*_CLASSES, "IMAGE", "MASK"}


def checked(execute: Callable) -> Callable:
    """Decorator of a node's ``execute``: checks the inputs, and puts the node's name before whatever it raises.

    Numbers are finite and in the range of their widget, choices among the options, images ``(B, H, W, 3)`` and masks
    ``(M, H, W)`` finite floats in 0…1. :class:`FeedFaceError` names the node and the input.
    """

    names = list(inspect.signature(execute).parameters)[1:]

    @functools.wraps(execute)
    def run(cls, *positional: Any, **values: Any) -> Any:
        schema, values = cls.define_schema(), {**dict(zip(names, positional, strict=False)), **values}
        # As in ComfyUI, what validate_inputs takes is the node's own to check.
        own = inspect.signature(cls.validate_inputs).parameters if "validate_inputs" in vars(cls) else ()
        try:
            for one in schema.inputs:
                absent = values.get(one.id) is None and one.optional and one.get_io_type() in _SOCKETS
                if one.id in values and one.id not in own and not absent:
                    values[one.id] = check_input(one, values[one.id])
            return execute(cls, **values)
        except FeedFaceError as error:
            if str(error).startswith("FeedFace"):
                raise
            raise type(error)(f"{schema.display_name}: {error}") from error

    return run


def check_input(one: Any, value: Any) -> Any:
    """The value of one input of a schema, in its plain form. Raises :class:`FeedFaceError`."""
    kind = one.get_io_type()
    if kind in _CLASSES:
        if not isinstance(value, _CLASSES[kind]):
            raise _unexpected(one, value, f"what an output {kind} gives")
    elif kind in ("FLOAT", "INT"):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and one.min <= value <= one.max
        if not number or (kind == "INT" and value != int(value)):  # a NaN is in no range
            word = "number" if kind == "FLOAT" else "whole number"
            raise _unexpected(one, value, f"a {word} from {one.min:g} to {one.max:g}")
        return float(value) if kind == "FLOAT" else int(value)
    elif kind == "COMBO":
        if not isinstance(value, str) or value not in one.options:
            raise _unexpected(one, value, f"one of {', '.join(map(str, one.options[:20]))}")
    elif kind in ("STRING", "BOOLEAN"):
        if not isinstance(value, str if kind == "STRING" else bool):
            raise _unexpected(one, value, "a text" if kind == "STRING" else "true or false")
    elif kind == "IMAGE":
        return _image(one, value)
    elif kind == "CONDITIONING":
        _check_conditioning(one, value)
    elif kind == "MASK":
        return _mask(one, value)
    return value


def _unexpected(one: Any, value: Any, expected: str) -> FeedFaceError:
    return FeedFaceError(f"{one.id} is {shorten(value)}, expected {expected}")


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose numbers are all there, in memory of a device: neither sparse nor quantised."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized:
        return False
    return value.layout is torch.strided and not value.is_meta


def _image(one: Any, value: Any) -> Tensor:
    if not _is_plain(value) or value.ndim != 4 or value.shape[-1] not in (1, 3, 4) or 0 in value.shape:
        raise _unexpected(one, value, "images (B, H, W, 3)")
    if not value.is_floating_point():
        raise _unexpected(one, value, "floats in 0…1")
    value = value.detach()
    if value.itemsize == 1:  # 8-bit floats, in which torch computes nothing
        value = value.float()
    low, high = (float(limit) for limit in torch.aminmax(value))
    if not (low >= -0.5 and high <= 1.5):  # a NaN is in no range
        raise _unexpected(one, value, f"values of 0 to 1, and holds values from {low:g} to {high:g}")
    return value


def _check_conditioning(one: Any, value: Any) -> None:
    usable = isinstance(value, (list, tuple)) and all(
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and (entry[0] is None or isinstance(entry[0], Tensor))
        and isinstance(entry[1], dict)
        and isinstance(entry[1].get("feedface", {}), dict)
        for entry in value
    )
    if not usable:
        raise _unexpected(one, value, "what an output CONDITIONING gives")


def _mask(one: Any, value: Any) -> Tensor:
    if not _is_plain(value) or value.ndim not in (2, 3) or 0 in value.shape or value.is_complex():
        raise _unexpected(one, value, "a mask (masks, height, width)")
    value = value.detach()
    if not math.isfinite(float(value.sum(dtype=torch.float64))):
        raise _unexpected(one, value, "finite values, and holds NaN or infinite ones")
    return value.reshape(-1, *value.shape[-2:]).float().clamp(0.0, 1.0)
