"""Recognising the face of a photo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.preparation import BOX, make_staged

from feedface_core.faces import DetectedFace
from trainer.config.preparation import DetectSettings, IdentitySettings
from trainer.preparation.recognise import Recognise, load_recogniser


def test_insightface_vector_is_that_of_the_face(monkeypatch):
    vectors = {name: torch.nn.functional.normalize(torch.randn(512), dim=0) for name in ("mine", "other")}

    class Detector:
        detail = "buffalo_l"

        def detect(self, image):
            return [
                DetectedFace((100, 70, 150, 118), embedding=vectors["other"]),
                DetectedFace((52, 31, 109, 92), embedding=vectors["mine"]),
            ]

    monkeypatch.setattr("feedface_core.faces.recognisers.load_detector", lambda *_, **__: Detector())
    clustered = IdentitySettings(source="cluster", recogniser="insightface")
    recogniser = load_recogniser(clustered, DetectSettings())
    assert recogniser.name == "insightface/buffalo_l"
    stage = Recognise(recogniser, clustered)
    found, lost = make_staged(), make_staged()
    found.face, lost.face = DetectedFace(tuple(BOX)), DetectedFace((0, 0, 30, 30))
    stage([found, lost])
    assert np.array(found.vector) == pytest.approx(vectors["mine"].numpy(), abs=1e-5)
    assert lost.reason == "face not recognised" and lost.vector is None
    tolerated, unasked = make_staged(), make_staged()
    tolerated.face, unasked.face = DetectedFace((0, 0, 30, 30)), DetectedFace(tuple(BOX))
    tolerated.id = "ann/1.png"  # only in sub-folders are faces compared to say who it is
    Recognise(recogniser, IdentitySettings())([tolerated, unasked])
    assert tolerated.kept and tolerated.vector == [] and unasked.vector is None
