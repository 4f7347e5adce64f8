"""Identity guidance in a real ComfyUI: what it leaves alone, where it acts, and that it makes a face more alike."""

from __future__ import annotations

import pytest
import torch
from support.small_model import sample

BOX = "[[24, 32, 96, 104]]"


@pytest.fixture(scope="module")
def module(comfy):
    return comfy.module("nodes.identity_guidance")


@pytest.fixture
def guide(module, model, adapter, face, vae):
    def make(model=model, **changes):
        inputs = {"scale": 0.3, "start": 0.0, "end": 1.0, "every": 1, "boxes": BOX, **changes}
        return module.IdentityGuidanceNode.execute(model, adapter, face, vae, **inputs).args[0]

    return make


def likeness(module, adapter, face, vae, model, latents):
    """Cosine between the face at :data:`BOX` of finished latents and the references."""
    guidance = module.IdentityGuidance(adapter, face, vae, (24.0, 32.0, 96.0, 104.0), 0.3, 0.0, 1.0, 1)
    with torch.no_grad():
        picture = guidance.decode(model.model.process_latent_in(latents), model.model)[0].movedim(0, -1)
    from_crop = module.cut_squares(picture.movedim(-1, 0)[None], [module.square_box((24, 32, 96, 104), 1.1)], 224)
    hidden = adapter.encode(from_crop.movedim(1, -1))
    return torch.nn.functional.cosine_similarity(hidden[:, 0], face.hidden[:, 0]).item()


def test_scale_0_is_the_model_itself(guide, model) -> None:
    assert guide(scale=0.0) is model


def test_it_makes_the_face_more_alike_and_leaves_the_model_as_it_was(module, guide, model, adapter, face, vae) -> None:
    plain = sample(model, steps=4)
    with torch.inference_mode():  # as ComfyUI runs graphs
        pulled = sample(guide(), steps=4)
    before, after = (likeness(module, adapter, face, vae, model, latents) for latents in (plain, pulled))
    assert after > before + 0.002
    assert torch.equal(sample(model, steps=4), plain)


def test_only_the_face_and_its_margin_move_in_a_step(module, model, adapter, face, vae) -> None:
    guidance = module.IdentityGuidance(adapter, face, vae, (64.0, 64.0, 96.0, 96.0), 0.5, 0.0, 1.0, 1)
    clean = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    moved = guidance.pulled(clean, model.model, (64.0, 64.0, 96.0, 96.0))
    apart = (moved - clean).abs().amax((0, 1))
    top, bottom, left, right = module.window_of((62.4, 62.4, 97.6, 97.6), 24, 24, 8)
    assert (top, bottom, left, right) == (3, 17, 3, 17)
    assert apart[top:bottom, left:right].max() > 0
    apart[top:bottom, left:right] = 0
    assert apart.max() == 0
    cells = 4 * (35.2 / 8) ** 2
    assert (moved - clean).norm().item() == pytest.approx(0.5 * cells**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("start", "end", "every", "expected"), [(0.0, 1.0, 1, 8), (0.0, 1.0, 3, 3), (0.5, 1.0, 1, 4), (0.0, 0.0, 1, 0)]
)
def test_it_acts_in_its_range_every_so_many_steps(module, guide, monkeypatch, start, end, every, expected) -> None:
    calls = []
    monkeypatch.setattr(module.IdentityGuidance, "pulled", lambda self, clean, *_: calls.append(1) or clean)
    sample(guide(start=start, end=end, every=every), steps=8)
    assert len(calls) == pytest.approx(expected, abs=1 if start else 0)


def test_it_acts_behind_the_guider_with_a_face(module, guide, pack, model, adapter, face, monkeypatch) -> None:
    from support.small_model import NEGATIVE, POSITIVE, apply, prompt

    patched = apply(pack, model, adapter, face)
    found = []
    for one in (patched, guide(model=patched)):
        guider = pack.guidance.make_guider(one, prompt(POSITIVE), prompt(NEGATIVE), 5.0, 3.0, 0.0, "text, then face")
        found.append(sample(one, guider=guider))
    assert not torch.equal(*found)


def test_every_picture_of_a_batch_is_pulled_as_it_would_be_alone(guide, model) -> None:
    plain, pulled = sample(model, batch=2, steps=1), sample(guide(), batch=2, steps=1)
    assert (pulled - plain).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(sample(guide(), steps=1)[0], pulled[0], atol=1e-3, rtol=1e-3)


def test_without_boxes_a_detector_finds_the_face_in_the_predicted_picture(
    module, guide, comfy, model, monkeypatch, caplog
) -> None:
    base = comfy.module("feedface_core.faces.detectors.base")
    box = comfy.module("feedface_core.faces.box")

    class Finder(base.Detector):
        name, detail, seen, boxes = "finder", "", [], [(24.0, 32.0, 96.0, 104.0)]

        def find(self, image):
            self.seen.append(image.shape)
            return [box.DetectedFace(one, 0.9, source="finder") for one in self.boxes]

    monkeypatch.setattr(module, "load_detector", lambda *_, **__: Finder())
    torch.testing.assert_close(sample(guide(boxes="")), sample(guide()))
    assert Finder.seen[0] == (128, 128, 3)
    Finder.boxes = []
    assert torch.equal(sample(guide(boxes="")), sample(model))
    assert caplog.text.count("no face in the picture yet") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": "[[0, 0, 9, 9], [9, 9, 20, 20]]"}, "boxes: there are 2, expected the one of the face"),
        ({"boxes": "there"}, "boxes: not JSON"),
        ({"start": 0.8, "end": 0.2}, "start 0.8 lies after end 0.2"),
        ({"scale": -1.0}, "scale is -1.0, expected a number from 0 to 10"),
    ],
)
def test_mistakes_are_named(guide, pack, changes, message) -> None:
    with pytest.raises(pack.face.FeedFaceError, match=f"^FeedFace Identity Guidance: .*{message}"):
        guide(**changes)


def test_no_vae_and_a_face_of_another_encoder_are_refused(module, pack, model, adapter, face, vae) -> None:
    execute, values = module.IdentityGuidanceNode.execute, {"scale": 1.0, "start": 0.0, "end": 1.0, "every": 1}
    with pytest.raises(pack.face.FeedFaceError, match="vae is 'text', expected what an output VAE gives"):
        execute(model, adapter, face, "text", **values)
    other = pack.conditioning.Face(torch.ones(1, 17, 8), encoder="0" * 12)
    with pytest.raises(pack.face.FeedFaceError, match="encoded by"):
        execute(model, adapter, other, vae, **values)
