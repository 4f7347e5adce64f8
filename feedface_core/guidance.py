"""Guidance with text and face apart, as pure functions.

With ∅ for dropped, t text and f face, every form is one linear combination of the four predictions ε(∅,∅), ε(t,∅),
ε(∅,f), ε(t,f) whose coefficients sum to one, so it holds alike for ε, v and denoised pictures. A prediction with
coefficient zero need not be computed. A background, of an adapter with a second stream, goes with the face, but where
a form has a scale of its own for it; then ε(t,f) is with it, and a fifth prediction without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .errors import FeedFaceError

PREDICTIONS = ("dropped", "text", "face", "both", "no_background")


@dataclass(frozen=True)
class Guidance:
    """``dropped·ε(∅,∅) + text·ε(t,∅) + face·ε(∅,f) + both·ε(t,f)``, and ``no_background`` times ε(t,f) without the
    background; the coefficients sum to one."""

    dropped: float
    text: float
    face: float
    both: float
    no_background: float = 0.0

    def __post_init__(self):
        values = [getattr(self, name) for name in PREDICTIONS]
        if not all(math.isfinite(value) for value in values):
            raise FeedFaceError(f"guidance scales must be finite numbers, got coefficients {values}")
        for name, value in zip(PREDICTIONS, values, strict=True):
            if abs(value) < 1e-9:  # what rounding leaves of a zero would cost a whole prediction
                object.__setattr__(self, name, 0.0)

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of the predictions that must be computed, in the order of :data:`PREDICTIONS`."""
        return tuple(name for name in PREDICTIONS if getattr(self, name) != 0.0)

    def combine(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """Predictions by name, all of one shape → the guided prediction. Raises ``KeyError`` when one is missing."""
        total = None
        for name in self.needed:
            term = predictions[name] * getattr(self, name)
            total = term if total is None else total + term
        return total

    @property
    def scale(self) -> float:
        """The one scale s of the same guidance written as ``ε(∅,∅) + s·(conditional − ε(∅,∅))``; 1 where ε(∅,∅) keeps
        its full weight, so that there is no such s."""
        return 1.0 - self.dropped if abs(1.0 - self.dropped) > 1e-9 else 1.0

    def conditional(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """The conditional prediction of that form, a mean of the predictions that are not ε(∅,∅)."""
        if self.dropped == 0.0 or abs(1.0 - self.dropped) <= 1e-9:
            return self.combine(predictions)
        rest = (getattr(self, name) / self.scale for name in PREDICTIONS[1:])
        return Guidance(0.0, *rest).combine(predictions)


def joint(scale: float) -> Guidance:
    """``ε(t,f) + s·(ε(t,f) − ε(∅,∅))``, the form of FeedFace (s = 5). ComfyUI's cfg is ``s + 1``."""
    return Guidance(dropped=-scale, text=0.0, face=0.0, both=1.0 + scale)


def text_then_face(text_scale: float, face_scale: float) -> Guidance:
    """``ε(∅,∅) + s_t·(ε(t,∅) − ε(∅,∅)) + s_f·(ε(t,f) − ε(t,∅))``, nested as in InstructPix2Pix (section 3.2.1)."""
    return Guidance(dropped=1.0 - text_scale, text=text_scale - face_scale, face=0.0, both=face_scale)


def face_then_text(text_scale: float, face_scale: float) -> Guidance:
    """``ε(∅,∅) + s_f·(ε(∅,f) − ε(∅,∅)) + s_t·(ε(t,f) − ε(∅,f))``, the mirror image of :func:`text_then_face`."""
    return Guidance(dropped=1.0 - face_scale, text=0.0, face=face_scale - text_scale, both=text_scale)


def text_face_background(text_scale: float, face_scale: float, background_scale: float) -> Guidance:
    """:func:`text_then_face`, and ``+ s_b·(ε(t,f,b) − ε(t,f))``: a scale for each stream of an adapter with two."""
    return Guidance(
        dropped=1.0 - text_scale,
        text=text_scale - face_scale,
        face=0.0,
        both=background_scale,
        no_background=face_scale - background_scale,
    )


FORMS = ("text_then_face", "face_then_text", "three_weights", "joint", "text_face_background")


def by_name(form: str, text_scale: float, face_scale: float, both_scale: float = 0.0) -> Guidance:
    """One of :data:`FORMS` by its name. ``joint`` uses ``text_scale``; ``both_scale`` is for ``three_weights``, and the
    background's in ``text_face_background``. Raises :class:`FeedFaceError`."""
    if form == "joint":
        return joint(text_scale)
    if form == "three_weights":
        return three_weights(text_scale, face_scale, both_scale)
    if form == "text_face_background":
        return text_face_background(text_scale, face_scale, both_scale)
    if form not in FORMS:
        raise FeedFaceError(f"guidance form {form!r}, expected one of {', '.join(FORMS)}")
    return (text_then_face if form == "text_then_face" else face_then_text)(text_scale, face_scale)


def three_weights(text: float, face: float, both: float) -> Guidance:
    """``ε(∅,∅) + w_t·(ε(t,∅) − ε(∅,∅)) + w_f·(ε(∅,f) − ε(∅,∅)) + w_tf·(ε(t,f) − ε(∅,∅))``, Face0."""
    return Guidance(dropped=1.0 - text - face - both, text=text, face=face, both=both)
