"""Faces, their combination, and which rows of a batch they reach."""

from __future__ import annotations

import math

import pytest
import torch

from feedface_core.adapter import FaceAdapter
from feedface_core.config import AdapterConfig, EncoderConfig, SiteConfig
from feedface_core.rows import Face, FaceContext, FaceRows, add_control, merge_rows

ENCODER = EncoderConfig(config={"hidden_size": 12, "patch_size": 112}, image_size=224)  # five tokens


def make_adapter(**fields) -> FaceAdapter:
    torch.manual_seed(0)
    adapter = FaceAdapter(AdapterConfig("sd_unet", (SiteConfig("a", 24, 3, 8), SiteConfig("b", 24, 3, 8)), 16, ENCODER,
                                        **fields))
    for branch in adapter.branches:
        torch.nn.init.normal_(branch.zero_linear.weight, std=0.2)
    return adapter.requires_grad_(False)


HIDDEN = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))
X = torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(2))
Y = torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(3))


def test_concat_lines_the_references_up():
    tokens, bias = Face(HIDDEN).combined()
    assert tokens.shape == (1, 15, 12) and bias is None
    assert torch.equal(tokens[0, 5:10], HIDDEN[1])


def test_weights_of_concat_are_logarithms_of_each_reference():
    tokens, bias = Face(HIDDEN, (1.0, 0.0, 0.5)).combined()
    assert tokens.shape == (1, 10, 12) and torch.equal(tokens[0, 5:], HIDDEN[2])
    assert bias.shape == (1, 1, 1, 10)
    assert bias.flatten().tolist() == pytest.approx([0.0] * 5 + [math.log(0.5)] * 5)


def test_equal_weights_need_no_bias():
    assert Face(HIDDEN, (0.5, 0.5, 0.0)).combined()[1] is None


def test_averages():
    torch.testing.assert_close(Face(HIDDEN, (3.0, 1.0, 0.0), "average").combined()[0][0], HIDDEN[:2].mean(0))
    torch.testing.assert_close(Face(HIDDEN, (3.0, 1.0, 0.0), "weighted_average").combined()[0][0],
                               0.75 * HIDDEN[0] + 0.25 * HIDDEN[1])


@pytest.mark.parametrize("fields, message", [
    ({"hidden": torch.zeros(0, 5, 12)}, "needs hidden states"),
    ({"hidden": torch.zeros(5, 12)}, "needs hidden states"),
    ({"weights": (1.0,)}, "1 weights for 3 references"),
    ({"weights": (1.0, -1.0, 0.0)}, "finite and not negative"),
    ({"weights": (1.0, float("nan"), 0.0)}, "finite and not negative"),
    ({"combination": "mean"}, "combination is 'mean', expected one of concat, average, weighted_average"),
])
def test_bad_faces_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Face(**{"hidden": HIDDEN, **fields})


def test_rows_without_a_face_are_the_very_tensor():
    context = FaceContext.of(make_adapter(), Face(HIDDEN))
    assert add_control(0, X, Y, [FaceRows(3), FaceRows(1, context, 0.0)]) is Y


@pytest.mark.parametrize("tap", ["input", "output"])
def test_each_row_gets_its_own_face_and_strength(tap):
    adapter = make_adapter(tap=tap)
    first, second = FaceContext.of(adapter, Face(HIDDEN[:1])), FaceContext.of(adapter, Face(HIDDEN[1:]))
    rows = [FaceRows(1), FaceRows(1, first, 0.5), FaceRows(1, second), FaceRows(1, first, 0.5)]
    out = add_control(1, X, Y, rows)
    source = X if tap == "input" else Y
    branch = adapter.branches[1]

    def added(row, hidden):
        return branch(source[row:row + 1], branch.project_face(adapter.project(hidden.flatten(0, 1)[None])))[0]

    assert torch.equal(out[0], Y[0])
    torch.testing.assert_close(out[1], Y[1] + 0.5 * added(1, HIDDEN[:1]))
    torch.testing.assert_close(out[2], Y[2] + added(2, HIDDEN[1:]))
    torch.testing.assert_close(out[3], Y[3] + 0.5 * added(3, HIDDEN[:1]))


def test_a_mask_confines_the_branch_to_its_cells():
    """A 4 × 6 mask on a 2 × 3 grid: half-covered cells get half."""
    context = FaceContext.of(make_adapter(), Face(HIDDEN))
    mask = torch.zeros(1, 4, 6)
    mask[:, :, :3] = 1.0
    full = add_control(0, X, Y, [FaceRows(4, context)], (2, 3)) - Y
    masked = add_control(0, X, Y, [FaceRows(4, context, mask=mask)], (2, 3)) - Y
    share = torch.tensor([1.0, 0.5, 0.0]).repeat(2).view(1, 6, 1)
    torch.testing.assert_close(masked, full * share, atol=1e-6, rtol=1e-5)
    assert not masked[:, 2].any() and masked[:, 0].any()


def test_only_the_last_tokens_are_the_picture():
    adapter = make_adapter()
    context = FaceContext.of(adapter, Face(HIDDEN))
    out = add_control(0, X, Y, [FaceRows(4, context)], (2, 2))
    assert torch.equal(out[:, :2], Y[:, :2])
    alone = add_control(0, X[:, 2:], Y[:, 2:], [FaceRows(4, context)])
    torch.testing.assert_close(out[:, 2:], alone)


def test_keys_and_values_are_kept():
    adapter = make_adapter()
    context = FaceContext.of(adapter, Face(HIDDEN))
    assert context.face_kv(0, X) is context.face_kv(0, X)
    assert context.face_kv(0, X.double().float()) is context.face_kv(0, X)
    half = context.face_kv(0, X.to(torch.float64)) if adapter.double() else None
    assert half[0][0].dtype == torch.float64


def test_neighbours_with_one_face_run_together():
    context = FaceContext.of(make_adapter(), Face(HIDDEN))
    rows = [FaceRows(1, context), FaceRows(2, context), FaceRows(1, context, 0.5), FaceRows(1), FaceRows(1)]
    merged = merge_rows(rows)
    assert [(entry.count, entry.strength, entry.context is context) for entry in merged] == [
        (3, 1.0, True), (1, 0.5, True), (1, 1.0, False), (1, 1.0, False)]


def test_a_wrong_count_of_rows_is_refused():
    context = FaceContext.of(make_adapter(), Face(HIDDEN))
    with pytest.raises(ValueError, match="the batch has 4 rows, but faces were described for 3"):
        add_control(0, X, Y, [FaceRows(3, context)])
    with pytest.raises(ValueError, match="needs the token grid"):
        add_control(0, X, Y, [FaceRows(4, context, mask=torch.ones(1, 2, 3))])


@pytest.mark.parametrize("null", ["learned", "zero_crop"])
def test_a_null_face_is_what_the_adapter_says(null):
    adapter = make_adapter(null=null)
    name = "null_tokens" if null == "learned" else "null_hidden"
    torch.nn.init.normal_(getattr(adapter, name))
    out = add_control(0, X, Y, [FaceRows(4, FaceContext.null(adapter, X.device, X.dtype))])
    tokens = adapter.null_tokens if null == "learned" else adapter.project(adapter.null_hidden)
    branch = adapter.branches[0]
    torch.testing.assert_close(out, Y + branch(X, branch.project_face(tokens)))
    with pytest.raises(ValueError, match="no null tokens"):
        make_adapter().null(X.device, X.dtype)


def test_gradients_reach_branches_and_projection_through_the_rows():
    adapter = make_adapter().requires_grad_(True)
    context = FaceContext.of(adapter, Face(HIDDEN))
    add_control(0, X, Y, [FaceRows(2), FaceRows(2, context)]).square().sum().backward()
    assert adapter.projection.weight.grad.any()
    assert all(parameter.grad is not None for parameter in adapter.branches[0].parameters())
    assert all(parameter.grad is None for parameter in adapter.branches[1].parameters())
