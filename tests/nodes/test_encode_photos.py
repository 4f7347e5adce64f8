"""FeedFace Encode Faces with the crops of several photos on inputs of their own."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def encode(pack, adapter):
    return lambda *args, **options: pack.face.EncodeFaces.execute(adapter, *args, **options)


def test_inputs_join_like_a_batch(encode, crops):
    batch = encode(crops, weights="1, 0.5, 2").args[0]
    apart = encode(crops[:1], crops_2=crops[1:2], crops_4=crops[2:], weights="1, 0.5, 2").args[0]
    assert torch.equal(batch.hidden, apart.hidden)
    assert apart.weights == (1.0, 0.5, 2.0) and apart.combination == batch.combination


def test_sizes_may_differ_and_the_order_stays(encode, crops):
    large = torch.rand(1, 96, 80, 3, generator=torch.Generator().manual_seed(4))
    mixed = encode(crops[:1], crops_2=large, crops_3=crops[1:]).args[0]
    singles = [encode(one).args[0].hidden for one in (crops[:1], large, crops[1:2], crops[2:])]
    torch.testing.assert_close(mixed.hidden, torch.cat(singles), atol=1e-5, rtol=1e-5)


def test_limit_counts_over_all_inputs(encode, crops):
    output = encode(crops[:2], crops_2=crops[2:], max_references=2)
    assert torch.equal(output.args[0].hidden, encode(crops[:2]).args[0].hidden)
    assert output.ui.as_dict()["text"][0].startswith("2 of 3 crops encoded")


def test_mistakes_are_named(encode, crops):
    with pytest.raises(ValueError, match=r"FeedFace Encode Faces: 2 weights \('1, 1'\) for 3 crops"):
        encode(crops[:1], crops_2=crops[1:], weights="1, 1")
    with pytest.raises(ValueError, match="values from nan"):
        encode(crops[:1], crops_3=torch.full((1, 32, 32, 3), float("nan")))
