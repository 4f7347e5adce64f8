"""Faces, their combination, and which rows of a batch they reach."""

from __future__ import annotations

import math

import pytest
import torch

from feedface_core.arithmetic import mix_faces
from feedface_core.conditioning import Face, FaceControl, combine_references
from feedface_core.config import AdapterConfig, EncoderConfig, SiteConfig
from feedface_core.hosts.site import add_control, merge_rows
from feedface_core.modules.adapter import FaceAdapter

ENCODER = EncoderConfig(config={"hidden_size": 12, "patch_size": 112}, image_size=224)  # five tokens


def make_adapter(**fields) -> FaceAdapter:
    torch.manual_seed(0)
    adapter = FaceAdapter(
        AdapterConfig("sd_unet", (SiteConfig("a", 24, 3, 8), SiteConfig("b", 24, 3, 8)), 16, ENCODER, **fields)
    )
    for branch in adapter.branches:
        torch.nn.init.normal_(branch.zero_linear.weight, std=0.2)
    return adapter.requires_grad_(False)


HIDDEN = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))
X = torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(2))
Y = torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(3))


def combined(face: Face):
    return combine_references(face.hidden, [len(face.hidden)], face.combination, face.weights)


def control_of(adapter, hidden, **fields) -> FaceControl:
    return adapter.control_of(Face(hidden), "cpu", torch.float32, **fields)


def test_concat_lines_the_references_up():
    tokens, bias = combined(Face(HIDDEN))
    assert tokens.shape == (1, 15, 12) and bias is None
    assert torch.equal(tokens[0, 5:10], HIDDEN[1])


def test_weights_of_concat_are_logarithms_of_each_reference():
    tokens, bias = combined(Face(HIDDEN, (1.0, 0.0, 0.5)))
    assert tokens.shape == (1, 10, 12) and torch.equal(tokens[0, 5:], HIDDEN[2])
    assert bias.shape == (1, 1, 1, 10)
    assert bias.flatten().tolist() == pytest.approx([0.0] * 5 + [math.log(0.5)] * 5)


def test_equal_weights_need_no_bias():
    assert combined(Face(HIDDEN, (0.5, 0.5, 0.0)))[1] is None


def test_averages():
    torch.testing.assert_close(combined(Face(HIDDEN, (3.0, 1.0, 0.0), "average"))[0][0], HIDDEN[:2].mean(0))
    torch.testing.assert_close(
        combined(Face(HIDDEN, (3.0, 1.0, 0.0), "weighted_average"))[0][0], 0.75 * HIDDEN[0] + 0.25 * HIDDEN[1]
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden": torch.zeros(0, 5, 12)}, "expected floats .references, tokens, width."),
        ({"hidden": torch.zeros(5, 12)}, "expected floats .references, tokens, width."),
        ({"weights": (1.0,)}, r"weights of the references are \(1.0,\), expected 3 numbers"),
        ({"weights": (1.0, -1.0, 0.0)}, "expected 3 numbers, each 0 or from 1e-30 to 1e6"),
        ({"weights": (1.0, float("nan"), 0.0)}, "expected 3 numbers, each 0 or from 1e-30 to 1e6"),
        ({"combination": "mean"}, "combination is 'mean', expected one of concat, average, weighted_average"),
    ],
)
def test_bad_faces_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Face(**{"hidden": HIDDEN, **fields})


def test_rows_without_a_face_are_the_very_tensor():
    adapter = make_adapter()
    assert add_control(adapter, 0, X, Y, [(3, None), (1, control_of(adapter, HIDDEN, strength=0.0))]) is Y


@pytest.mark.parametrize("tap", ["input", "output"])
def test_each_row_gets_its_own_face_and_strength(tap):
    adapter = make_adapter(tap=tap)
    first, second = control_of(adapter, HIDDEN[:1], strength=0.5), control_of(adapter, HIDDEN[1:])
    out = add_control(adapter, 1, X, Y, [(1, None), (1, first), (1, second), (1, first)])
    source = X if tap == "input" else Y
    branch = adapter.branches[1]

    def added(row, hidden):
        return branch(source[row : row + 1], branch.project_face(adapter.project(hidden.flatten(0, 1)[None])))[0]

    assert torch.equal(out[0], Y[0])
    torch.testing.assert_close(out[1], Y[1] + 0.5 * added(1, HIDDEN[:1]))
    torch.testing.assert_close(out[2], Y[2] + added(2, HIDDEN[1:]))
    torch.testing.assert_close(out[3], Y[3] + 0.5 * added(3, HIDDEN[:1]))


def test_a_mask_confines_the_branch_to_its_cells():
    """A 4 × 6 mask on a 2 × 3 grid: half-covered cells get half."""
    adapter = make_adapter()
    mask = torch.zeros(1, 4, 6)
    mask[:, :, :3] = 1.0
    full = add_control(adapter, 0, X, Y, [(4, control_of(adapter, HIDDEN))], (2, 3)) - Y
    masked = add_control(adapter, 0, X, Y, [(4, control_of(adapter, HIDDEN, mask=mask))], (2, 3)) - Y
    share = torch.tensor([1.0, 0.5, 0.0]).repeat(2).view(1, 6, 1)
    torch.testing.assert_close(masked, full * share, atol=1e-6, rtol=1e-5)
    assert not masked[:, 2].any() and masked[:, 0].any()


def test_only_the_last_tokens_are_the_picture():
    adapter = make_adapter()
    control = control_of(adapter, HIDDEN)
    out = add_control(adapter, 0, X, Y, [(4, control)], (2, 2))
    assert torch.equal(out[:, :2], Y[:, :2])
    alone = add_control(adapter, 0, X[:, 2:], Y[:, 2:], [(4, control)])
    torch.testing.assert_close(out[:, 2:], alone)


@pytest.mark.parametrize("combination", ["concat", "average", "weighted_average"])
def test_faces_combined_together_are_those_combined_alone(combination):
    """One face of two references and one of a single one, in one padded batch."""
    adapter, weights = make_adapter(), (2.0, 1.0, 3.0)
    tokens, bias = combine_references(HIDDEN, [2, 1], combination, weights)
    together = add_control(adapter, 0, X[:2], Y[:2], [(2, adapter.control(adapter.project(tokens), bias))])
    for row, part in enumerate((slice(0, 2), slice(2, 3))):
        face = Face(HIDDEN[part], weights[part], combination)
        alone = adapter.control_of(face, "cpu", torch.float32)
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], add_control(adapter, 0, X[one], Y[one], [(1, alone)]))


def test_padded_references_do_not_count():
    hidden = torch.arange(3 * 2 * 1, dtype=torch.float32).view(3, 2, 1)
    tokens, bias = combine_references(hidden, [1, 2])
    assert tokens[..., 0].tolist() == [[0, 1, 0, 0], [2, 3, 4, 5]]
    assert bias[:, 0, 0].tolist() == [[0, 0, -torch.inf, -torch.inf], [0, 0, 0, 0]]
    assert combine_references(hidden, [3])[1] is None
    averaged, none = combine_references(hidden, [1, 2], "average")
    assert averaged[..., 0].tolist() == [[0, 1], [3, 4]] and none is None


def test_mixing_follows_the_share():
    a, b = Face(HIDDEN[:2], (3.0, 1.0), encoder="e"), Face(HIDDEN[2:], encoder="e")
    means = {"average": HIDDEN[:2].mean(0), "weighted_average": 0.75 * HIDDEN[0] + 0.25 * HIDDEN[1]}
    for combination, own in means.items():
        for share in (0.0, 0.1, 0.5, 0.9, 1.0):
            tokens, _ = combined(mix_faces(a, b, share, combination))
            torch.testing.assert_close(tokens[0], (1 - share) * own + share * HIDDEN[2])
    tokens, bias = combined(mix_faces(a, b, 0.2, "concat"))
    assert bias.flatten()[[0, 5, 10]].exp().tolist() == pytest.approx([1.0, 1 / 3, 1 / 3])
    with pytest.raises(ValueError, match="face_a comes from encoder e .*face_b from f"):
        mix_faces(a, Face(HIDDEN, encoder="f"), 0.5, "concat")


def test_neighbours_with_one_face_run_together():
    adapter = make_adapter()
    control, weak = control_of(adapter, HIDDEN), control_of(adapter, HIDDEN, strength=0.5)
    rows = [(1, control), (2, control), (1, weak), (1, None), (1, None)]
    assert merge_rows(rows) == [(3, control), (1, weak), (2, None)]


def test_a_wrong_count_of_rows_is_refused():
    adapter = make_adapter()
    with pytest.raises(ValueError, match="the batch has 4 rows, but faces were described for 3"):
        add_control(adapter, 0, X, Y, [(3, control_of(adapter, HIDDEN))])
    with pytest.raises(ValueError, match="needs the token grid"):
        add_control(adapter, 0, X, Y, [(4, control_of(adapter, HIDDEN, mask=torch.ones(1, 2, 3)))])


@pytest.mark.parametrize("null", ["learned", "zero_crop"])
def test_a_null_face_is_what_the_adapter_says(null):
    adapter = make_adapter(null=null)
    name = "null_tokens" if null == "learned" else "null_hidden"
    torch.nn.init.normal_(getattr(adapter, name))
    out = add_control(adapter, 0, X, Y, [(4, adapter.null_control(X.device, X.dtype))])
    tokens = adapter.null_tokens if null == "learned" else adapter.project(adapter.null_hidden)
    branch = adapter.branches[0]
    torch.testing.assert_close(out, Y + branch(X, branch.project_face(tokens)))
    assert make_adapter().null(X.device, X.dtype) is None is make_adapter().null_control(X.device, X.dtype)


def test_gradients_reach_branches_and_projection_through_the_rows():
    adapter = make_adapter().requires_grad_(True)
    add_control(adapter, 0, X, Y, [(2, None), (2, control_of(adapter, HIDDEN))]).square().sum().backward()
    assert adapter.projection.weight.grad.any()
    assert all(parameter.grad is not None for parameter in adapter.branches[0].parameters())
    assert all(parameter.grad is None for parameter in adapter.branches[1].parameters())
