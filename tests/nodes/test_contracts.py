"""The promises of Apply FeedFace, against ComfyUI's own sampling."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.small_model import NEGATIVE, POSITIVE, apply, build_model, prompt, sample


def test_face_changes_the_picture(pack, model, adapter, face):
    plain, faced = sample(model), sample(apply(pack, model, adapter, face))
    assert (plain - faced).abs().max() > 0.05
