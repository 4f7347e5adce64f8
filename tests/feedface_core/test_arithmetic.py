"""Arithmetic on faces: ends, middles, lengths, seeds."""

from __future__ import annotations

import pytest
import torch

from feedface_core.arithmetic import add_difference, add_noise, interpolate, mean_tokens
from feedface_core.conditioning import Face
from feedface_core.errors import FeedFaceError

STATES = (
    torch.randn(3, 2, 5, 12, generator=torch.Generator().manual_seed(1))
    * torch.tensor([1.0, 3.0, 2.0])[:, None, None, None]
)
A, B, C = (Face(one, (1.0, 0.5), "average", "e") for one in STATES)


@pytest.mark.parametrize("spherical", [False, True])
def test_the_way_begins_and_ends_at_the_faces(spherical: bool) -> None:
    for share, face in ((0.0, A), (1.0, B)):
        torch.testing.assert_close(interpolate(A, B, share, spherical).hidden, mean_tokens(face), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(interpolate(A, A, 0.3, spherical).hidden, mean_tokens(A), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_an_arc_keeps_the_length_and_halves_the_angle(share: float) -> None:
    a, b, between = (mean_tokens(face) for face in (A, B, interpolate(A, B, share, True)))
    torch.testing.assert_close(between.norm(dim=-1), torch.lerp(a.norm(dim=-1), b.norm(dim=-1), share))

    def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(x, y, dim=-1).acos()

    torch.testing.assert_close(angle(a, between), share * angle(a, b), atol=1e-4, rtol=1e-3)
    assert (interpolate(A, B, share).hidden.norm(dim=-1) < between.norm(dim=-1)).all(), "a straight line cuts through"


def test_opposite_and_equal_tokens_are_finite() -> None:
    opposite = Face(-A.hidden, A.weights, encoder="e")
    empty = Face(A.hidden * torch.tensor([0.0, 1, 1, 1, 1])[:, None], A.weights, encoder="e")  # a token of zeros
    for other in (A, opposite, empty):
        assert interpolate(A, other, 0.5, True).hidden.isfinite().all()


@pytest.mark.parametrize("amount", [0.1, 1.0, 3.0])
def test_noise_is_as_long_as_it_says_and_follows_the_seed(amount: float) -> None:
    plain, one = mean_tokens(A), add_noise(A, amount, 7).hidden
    torch.testing.assert_close((one - plain).norm(dim=-1), amount * plain.norm(dim=-1))
    assert torch.equal(one, add_noise(A, amount, 7).hidden)
    assert not torch.equal(one, add_noise(A, amount, 8).hidden)
    assert torch.equal(add_noise(A, 0.0, 7).hidden, plain)


def test_difference() -> None:
    torch.testing.assert_close(add_difference(A, B, A, 1.0).hidden, mean_tokens(B))
    torch.testing.assert_close(add_difference(A, B, C, 0.0).hidden, mean_tokens(A))
    there = add_difference(A, B, C, 0.7)
    torch.testing.assert_close(add_difference(there, B, C, -0.7).hidden, mean_tokens(A), atol=1e-5, rtol=1e-4)


def test_faces_of_different_encoders() -> None:
    other = Face(torch.zeros(1, 5, 16), encoder="f")
    for call in (lambda: interpolate(A, other, 0.5), lambda: add_difference(A, B, other, 1.0)):
        with pytest.raises(FeedFaceError, match=r"comes from encoder e \(5, 12\), (face_b|minus) from f \(5, 16\)"):
            call()


def test_a_face_without_weight() -> None:
    with pytest.raises(FeedFaceError, match="every reference has weight 0"):
        add_noise(Face(A.hidden, (0.0, 0.0)), 0.5, 1)
