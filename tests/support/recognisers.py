"""Recognisers that a test needs."""

from __future__ import annotations

import pytest

from feedface_core.faces.recognisers import RecogniserUnavailable, load_recogniser


def need_dlib() -> None:
    """Skips the test where dlib or its weights are not installed."""
    try:
        load_recogniser("dlib")
    except RecogniserUnavailable as error:
        pytest.skip(str(error))
