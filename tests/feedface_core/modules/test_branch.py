"""The control branch against the formula of its parts, and its names against the released adapter's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from feedface_core.modules.branch import ControlBranch, scaled_dot_product_attention

RELEASED_NAMES = {
    "blocks.0.attn1.to_q.weight",
    "blocks.0.attn1.to_k.weight",
    "blocks.0.attn1.to_v.weight",
    "blocks.0.attn1.to_out.0.weight",
    "blocks.0.attn1.to_out.0.bias",
    "blocks.0.attn2.to_q.weight",
    "blocks.0.attn2.to_k.weight",
    "blocks.0.attn2.to_v.weight",
    "blocks.0.attn2.to_out.0.weight",
    "blocks.0.attn2.to_out.0.bias",
    "blocks.0.ff.net.0.proj.weight",
    "blocks.0.ff.net.0.proj.bias",
    "blocks.0.ff.net.2.weight",
    "blocks.0.ff.net.2.bias",
    "blocks.0.norm1.weight",
    "blocks.0.norm1.bias",
    "blocks.0.norm2.weight",
    "blocks.0.norm2.bias",
    "blocks.0.norm3.weight",
    "blocks.0.norm3.bias",
    "zero_linear.weight",
}


def make(**options) -> ControlBranch:
    torch.manual_seed(0)
    branch = ControlBranch(24, 16, heads=3, head_dim=8, **options)
    last = branch.zero_linear
    torch.nn.init.normal_(last.weight if hasattr(last, "weight") else last.up.weight, std=0.2)
    return branch


def direct(branch: ControlBranch, x, tokens, self_attention=True, mlp=True):
    """The branch written out with torch's functions and nothing of ours."""
    block = branch.blocks[0]

    def attend(layer, q, source):
        q, k, v = (
            t.view(*t.shape[:2], 3, 8).transpose(1, 2) for t in (layer.to_q(q), layer.to_k(source), layer.to_v(source))
        )
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        return layer.to_out[0]((weights @ v).transpose(1, 2).flatten(2))

    def norm(layer, h):
        return functional.layer_norm(h, (24,), layer.weight, layer.bias)

    if self_attention:
        normed = norm(block.norm1, x)
        x = x + attend(block.attn1, normed, normed)
    x = x + attend(block.attn2, norm(block.norm2, x), tokens)
    if not mlp:
        return x @ branch.zero_linear.weight.T
    value, gate = block.ff.net[0].proj(norm(block.norm3, x)).chunk(2, -1)
    return (x + block.ff.net[2](value * functional.gelu(gate))) @ branch.zero_linear.weight.T


def test_names_are_those_of_the_released_adapter():
    assert set(make().state_dict()) == RELEASED_NAMES


@pytest.mark.parametrize("self_attention", [True, False])
def test_branch_equals_the_formula(self_attention):
    branch = make(self_attention=self_attention)
    x, tokens = torch.randn(2, 6, 24), torch.randn(2, 5, 16)
    out = branch(x, branch.project_face(tokens))
    torch.testing.assert_close(out, direct(branch, x, tokens, self_attention), atol=1e-5, rtol=1e-5)
    assert out.shape == (2, 6, 24)
    assert out.std().item() == pytest.approx(1.0652 if self_attention else 0.9739, abs=1e-3)


def test_light_branch_is_one_attention_to_the_face():
    branch = make(self_attention=False, mlp=False)
    assert {name for name in RELEASED_NAMES if "attn2" in name or "norm2" in name or "zero" in name} == set(
        branch.state_dict()
    )
    x, tokens = torch.randn(2, 6, 24), torch.randn(2, 5, 16)
    expected = direct(branch, x, tokens, self_attention=False, mlp=False)
    torch.testing.assert_close(branch(x, branch.project_face(tokens)), expected, atol=1e-5, rtol=1e-5)


def test_low_rank_is_the_product_of_two_matrices():
    """A branch whose full matrices are those products gives the same."""
    low, full = make(rank=4, depth=2), make(depth=2)
    products = {
        name.replace(".up.weight", ".weight"): up @ low.state_dict()[name.replace(".up.", ".down.")]
        for name, up in low.state_dict().items()
        if name.endswith(".up.weight")
    }
    assert len(products) == 2 * 8 + 1 and all(torch.linalg.matrix_rank(one) <= 4 for one in products.values())
    others = {name.replace(".up.bias", ".bias"): t for name, t in low.state_dict().items() if ".down." not in name}
    full.load_state_dict({name: t for name, t in others.items() if ".up." not in name} | products)
    x, tokens = torch.randn(2, 6, 24), torch.randn(2, 5, 16)
    found, expected = (one(x, one.project_face(tokens)) for one in (low, full))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    light = make(rank=4, self_attention=False, mlp=False)
    assert sum(p.numel() for p in light.parameters()) < sum(p.numel() for p in make().parameters()) / 10


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"rank": 3, "mlp": False, "self_attention": False}])
def test_fresh_branch_adds_exactly_nothing(options):
    branch = ControlBranch(24, 16, 3, 8, **options)
    assert torch.equal(branch(torch.randn(2, 6, 24), branch.project_face(torch.randn(1, 5, 16))), torch.zeros(2, 6, 24))


@pytest.mark.parametrize(("options", "last"), [({}, "zero_linear.weight"), ({"rank": 3}, "zero_linear.up.weight")])
def test_only_the_zero_linear_learns_at_first(options, last):
    branch = ControlBranch(24, 16, 3, 8, **options)
    branch(torch.randn(2, 6, 24), branch.project_face(torch.randn(1, 5, 16))).square().sum().backward()
    assert all(not parameter.grad.any() for parameter in branch.parameters())  # d(y²) is zero at y = 0
    branch.zero_grad()
    branch(torch.randn(2, 6, 24), branch.project_face(torch.randn(1, 5, 16))).sum().backward()
    moved = {name for name, parameter in branch.named_parameters() if parameter.grad.any()}
    assert moved == {last}


def test_one_face_serves_every_row():
    branch = make()
    x, tokens = torch.randn(3, 6, 24), torch.randn(1, 5, 16)
    shared = branch(x, branch.project_face(tokens))
    torch.testing.assert_close(shared, branch(x, branch.project_face(tokens.expand(3, -1, -1))))


def test_bias_of_minus_infinity_hides_tokens():
    branch = make()
    x, tokens = torch.randn(1, 6, 24), torch.randn(1, 5, 16)
    bias = torch.tensor([0.0, 0.0, float("-inf"), float("-inf"), float("-inf")]).view(1, 1, 1, -1)
    torch.testing.assert_close(
        branch(x, branch.project_face(tokens), bias),
        branch(x, branch.project_face(tokens[:, :2])),
        atol=1e-6,
        rtol=1e-5,
    )


def test_depth_stacks_blocks_before_the_linear():
    branch = make(depth=2)
    assert len(branch.project_face(torch.randn(1, 5, 16))) == 2
    with pytest.raises(ValueError):
        branch(torch.randn(1, 6, 24), branch.project_face(torch.randn(1, 5, 16))[:1])


def test_attention_function_is_used_where_no_bias_is():
    calls = []

    def attention(*args):
        calls.append(args[3])
        return scaled_dot_product_attention(*args)

    branch = make(attention=attention)
    branch(torch.randn(1, 6, 24), branch.project_face(torch.randn(1, 5, 16)))
    assert calls == [3, 3]
