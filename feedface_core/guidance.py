"""Guidance with text and face apart, as pure functions.

With ∅ for dropped, t text and f face, every form is one linear combination of the four predictions ε(∅,∅), ε(t,∅),
ε(∅,f), ε(t,f) whose coefficients sum to one, so it holds alike for ε, v and denoised pictures. A prediction with
coefficient zero need not be computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

PREDICTIONS = ("dropped", "text", "face", "both")


@dataclass(frozen=True)
class Guidance:
    """``dropped·ε(∅,∅) + text·ε(t,∅) + face·ε(∅,f) + both·ε(t,f)``; the coefficients sum to one."""

    dropped: float
    text: float
    face: float
    both: float

    def __post_init__(self):
        values = [getattr(self, name) for name in PREDICTIONS]
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"guidance scales must be finite numbers, got coefficients {values}")
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


def joint(scale: float) -> Guidance:
    """``ε(t,f) + s·(ε(t,f) − ε(∅,∅))``, the form of FeedFace (s = 5). ComfyUI's cfg is ``s + 1``."""
    return Guidance(dropped=-scale, text=0.0, face=0.0, both=1.0 + scale)


def text_then_face(text_scale: float, face_scale: float) -> Guidance:
    """``ε(∅,∅) + s_t·(ε(t,∅) − ε(∅,∅)) + s_f·(ε(t,f) − ε(t,∅))``, nested as in InstructPix2Pix (section 3.2.1)."""
    return Guidance(dropped=1.0 - text_scale, text=text_scale - face_scale, face=0.0, both=face_scale)


def face_then_text(text_scale: float, face_scale: float) -> Guidance:
    """``ε(∅,∅) + s_f·(ε(∅,f) − ε(∅,∅)) + s_t·(ε(t,f) − ε(∅,f))``, the mirror image of :func:`text_then_face`."""
    return Guidance(dropped=1.0 - face_scale, text=0.0, face=face_scale - text_scale, both=text_scale)


def three_weights(text: float, face: float, both: float) -> Guidance:
    """``ε(∅,∅) + w_t·(ε(t,∅) − ε(∅,∅)) + w_f·(ε(∅,f) − ε(∅,∅)) + w_tf·(ε(t,f) − ε(∅,∅))``, Face0."""
    return Guidance(dropped=1.0 - text - face - both, text=text, face=face, both=both)
