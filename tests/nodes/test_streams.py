"""Adapters whose face stands among the text's tokens, and adapters with a second stream for the background."""

from __future__ import annotations

import pytest
import torch
from support.recognisers import need_dlib
from support.refused import refused
from support.small_model import CONTEXT, apply, prompt, sample


def encode(pack, adapter, crops):
    return pack.face.EncodeFaces.execute(adapter, crops).args[0]


def encode_background(pack, adapter, image):
    return pack.background.EncodeBackground.execute(adapter, image, "[[20, 20, 44, 44]]").args[0]


def both(pack, model, adapter, face=None, background=None, strength=1.0, background_strength=1.0):
    return pack.apply.ApplyFeedFace.execute(
        model, adapter, strength, 0.0, 1.0, face, None, background, background_strength
    ).args[0]


@pytest.fixture(params=[True, False], ids=["text tokens", "branches"])
def either(make_mixer, request):
    return make_mixer(text=request.param)


def test_a_face_in_the_text_is_that_text(pack, model, make_mixer, crops):
    """The same picture as the plain model with a prompt whose last tokens are the face's."""
    adapter = make_mixer(background=False)
    face = encode(pack, adapter, crops[:1])
    module = adapter.patcher(torch.float32).model
    tokens = module.project(face.hidden)  # (1, 2, C)
    [[states, values]] = prompt(11)
    by_hand = [[torch.cat([states[:, :-2], tokens], dim=1), values]]
    assert torch.equal(sample(apply(pack, model, adapter, face)), sample(model, positive=by_hand))


def test_a_longer_prompt_loses_its_last_tokens_alone(pack, model, make_mixer, crops):
    adapter = make_mixer(background=False)
    face = encode(pack, adapter, crops[:1])
    states = torch.randn(1, 154, CONTEXT, generator=torch.Generator().manual_seed(4))
    tokens = adapter.patcher(torch.float32).model.project(face.hidden)
    by_hand = [[torch.cat([states[:, :-2], tokens], dim=1), {"pooled_output": None}]]
    faced = sample(apply(pack, model, adapter, face), positive=[[states, {"pooled_output": None}]])
    assert torch.equal(faced, sample(model, positive=by_hand))


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"face": None}, {"start": 1.0}, {"end": 0.0}])
def test_off_is_the_unpatched_model(pack, model, either, crops, options):
    face = encode(pack, either, crops[:1])
    assert torch.equal(sample(apply(pack, model, either, **{"face": face, **options})), sample(model))


def test_a_range_of_steps(pack, model, make_mixer, crops):
    adapter = make_mixer(background=False)
    late = apply(pack, model, adapter, encode(pack, adapter, crops[:1]), start=0.5)
    assert torch.equal(sample(late, steps=2, last_step=1), sample(model, steps=2, last_step=1))
    assert not torch.equal(sample(late, steps=4), sample(model, steps=4))


def test_the_streams_act_by_themselves(pack, model, either, crops):
    face, background = encode(pack, either, crops[:1]), encode_background(pack, either, crops[1:2])
    plain = sample(model)
    pictures = [
        plain,
        sample(both(pack, model, either, face)),
        sample(both(pack, model, either, None, background)),
        sample(both(pack, model, either, face, background)),
        sample(both(pack, model, either, face, encode_background(pack, either, crops[2:3]))),
    ]
    for index, one in enumerate(pictures):
        for other in pictures[:index]:
            assert (one - other).abs().max() > 1e-3
    off = sample(both(pack, model, either, face, background, 1.0, 0.0))
    assert torch.equal(off, pictures[1])
    assert torch.equal(sample(both(pack, model, either, face, background, 0.0, 0.0)), plain)


def test_the_streams_of_one_text_stand_side_by_side(pack, mixer, crops):
    face, background = encode(pack, mixer, crops[:1]), encode_background(pack, mixer, crops[1:2])
    assert face.encoder != background.encoder
    offsets = [stream.config.text_tokens.offset for stream in mixer.streams]
    assert offsets == [0, mixer.streams[0].config.text_tokens.count]


def test_each_stream_takes_its_own(pack, model, either, crops):
    face, background = encode(pack, either, crops[:1]), encode_background(pack, either, crops[1:2])
    error = pack.format.FeedFaceError
    refused(lambda: both(pack, model, either, background), "face was encoded by", "Encode Faces", error=error)
    refused(lambda: both(pack, model, either, face, face), "background", "Encode Background", error=error)


def test_an_adapter_without_a_second_stream_says_so(pack, model, adapter, mixer, face, crops):
    background, error = encode_background(pack, mixer, crops[:1]), pack.format.FeedFaceError
    refused(lambda: both(pack, model, adapter, face, background), "no second stream", error=error)
    refused(lambda: encode_background(pack, adapter, crops[:1]), "no second stream", error=error)
    conditioning = prompt(1)
    set_face = pack.apply.SetFace.execute
    refused(lambda: set_face(conditioning, 1.0, None, None, None, background), "needs the adapter", error=error)


def test_a_prompt_with_a_face_and_a_background_of_its_own(pack, model, either, crops):
    face, background = encode(pack, either, crops[:1]), encode_background(pack, either, crops[1:2])
    positive = pack.apply.SetFace.execute(prompt(11), 1.0, face, None, either, background).args[0]
    expected = sample(both(pack, model, either, face, background))
    assert torch.equal(sample(both(pack, model, either), positive=positive), expected)


@pytest.mark.parametrize("text", [True, False])
def test_learned_null_tokens_reach_the_negative_prompt(pack, model, make_mixer, crops, text):
    adapter = make_mixer(text=text, background=False, null="learned")
    patched = apply(pack, model, adapter, encode(pack, adapter, crops[:1]))
    before = sample(patched, cfg=0.0)
    torch.nn.init.normal_(adapter.patcher(torch.float32).model.null_tokens)
    assert not torch.equal(sample(patched, cfg=0.0), before)
    torch.nn.init.zeros_(adapter.patcher(torch.float32).model.null_tokens)


def test_masks_and_regions_of_a_face_in_the_text_are_refused(pack, model, mixer, crops):
    face, error = encode(pack, mixer, crops[:1]), pack.format.FeedFaceError
    mask = torch.ones(1, 16, 16)
    refused(lambda: apply(pack, model, mixer, face, mask=mask), "whole picture", error=error)
    people = pack.conditioning.People((face, face), torch.ones(2, 16, 16))
    refused(lambda: sample(apply(pack, model, mixer, people)), "no regions", error=error)


def test_several_references_are_averaged(pack, model, mixer, crops):
    two = encode(pack, mixer, crops[:2])
    mean = pack.conditioning.Face(two.hidden.mean(0, keepdim=True), encoder=two.encoder)
    difference = sample(apply(pack, model, mixer, two)) - sample(apply(pack, model, mixer, mean))
    assert difference.abs().max() < 1e-4


def test_random_faces_come_again_by_their_seed(pack, model, mixer, adapter):
    draw = pack.number_nodes.RandomFace.execute
    one, again, other = (draw(mixer, seed, 1.0).args[0] for seed in (3, 3, 4))
    assert torch.equal(one.hidden, again.hidden) and not torch.equal(one.hidden, other.hidden)
    assert torch.equal(draw(mixer, 3, 0.0).args[0].hidden[0], mixer.statistics.mean)
    sample(apply(pack, model, mixer, one))
    refused(lambda: draw(adapter, 3, 1.0), adapter.name, "--statistics", error=pack.format.FeedFaceError)


def test_random_faces_are_as_varied_as_the_faces_seen(pack):
    mixing = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    seen = torch.randn(500, 4, generator=torch.Generator().manual_seed(1)) @ mixing
    statistics = pack.arithmetic.FaceStatistics.of(seen.view(500, 1, 12))
    drawn = torch.cat([statistics.draw(seed).hidden for seed in range(500)]).flatten(1)
    assert (drawn.mean(0) - seen.mean(0)).norm() < 0.2 * seen.std(0).norm()
    assert torch.allclose(drawn.T.cov(), seen.T.cov(), atol=0.25 * float(seen.T.cov().abs().max()))


@pytest.mark.parametrize("given", [[0.5] * 48, [[0.5] * 48] * 2, torch.full((48,), 0.5), str([0.5] * 48)])
def test_a_vector_of_another_node(pack, model, mixer, given):
    face = pack.number_nodes.FaceFromVector.execute(mixer, given).args[0]
    assert face.hidden.shape[1:] == (1, 48) and bool((face.hidden == 0.5).all())
    sample(apply(pack, model, mixer, face))


BAD_VECTORS = [[0.5] * 47, "", "[", "{}", None, [[1.0], [2.0, 3.0]], [float("nan")] * 48, [1e30] * 48, object(), []]


@pytest.mark.parametrize("given", BAD_VECTORS, ids=range(len(BAD_VECTORS)))
def test_a_vector_that_is_none(pack, mixer, adapter, given):
    error = pack.format.FeedFaceError
    refused(lambda: pack.number_nodes.FaceFromVector.execute(mixer, given), "Face From Vector", error=error)


def test_an_adapter_of_tokens_takes_no_vector(pack, adapter):
    error = pack.format.FeedFaceError
    refused(lambda: pack.number_nodes.FaceFromVector.execute(adapter, [0.5] * 48), "tokens", error=error)


def test_the_background_has_a_scale_of_its_own(pack, model, either, crops):
    """Against the formula, written out, from predictions of runs of their own."""
    face, background = encode(pack, either, crops[:1]), encode_background(pack, either, crops[1:2])
    model_with_both, model_with_face = both(pack, model, either, face, background), both(pack, model, either, face)

    def one(model, seed):
        return sample(model, prompt(seed), prompt(12), cfg=1.0, steps=1)

    none, text, faced, full = one(model, 12), one(model, 11), one(model_with_face, 11), one(model_with_both, 11)
    expected = none + 3.0 * (text - none) + 2.0 * (faced - text) + 1.5 * (full - faced)
    make = pack.guidance.Guider.execute
    guider = make(model_with_both, prompt(11), prompt(12), 3.0, 2.0, "text, face, background", 1.5).args[0]
    found = sample(model_with_both, guider=guider, steps=1)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_recogniser_that_the_adapter_names_encodes_the_crops(pack, model, tmp_path):
    need_dlib()
    config = pack.config
    encoder = config.EncoderConfig(
        config={"hidden_size": 128, "num_attention_heads": 1},
        type="recogniser",
        name="dlib",
        included=False,
        fingerprint="dlib",
    )
    tokens = config.TextTokensConfig(count=2, layers=2, width=24)
    host = {"host": "sd_unet", "sites": (), "context_width": CONTEXT, "encoder": encoder, "text_tokens": tokens}
    described = config.AdapterConfig(**host)
    weights = pack.core_adapter.FaceAdapter(described).state_dict()
    adapter = pack.adapter.LoadedAdapter(
        str(pack.format.save_adapter(tmp_path / "face0.safetensors", described, weights))
    )
    photos = torch.rand(2, 150, 150, 3, generator=torch.Generator().manual_seed(1))
    face = encode(pack, adapter, photos)
    assert face.hidden.shape == (2, 1, 128) and face.encoder == "dlib"
    vector = pack.number_nodes.FaceFromVector.execute(adapter, face.hidden[:, 0]).args[0]
    assert torch.equal(sample(apply(pack, model, adapter, face)), sample(apply(pack, model, adapter, vector)))
    assert not torch.equal(sample(apply(pack, model, adapter, face)), sample(model))
