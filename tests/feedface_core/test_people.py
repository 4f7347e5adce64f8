"""Several people in one picture: who reaches which tokens."""

from __future__ import annotations

import pytest
import torch

from feedface_core.conditioning import Face, FaceControl, People
from feedface_core.config import AdapterConfig, EncoderConfig, SiteConfig
from feedface_core.errors import FeedFaceError
from feedface_core.faces.regions import box_masks, column_masks, draw_regions, match_faces
from feedface_core.hosts.hooks import grid_at
from feedface_core.hosts.site import add_control
from feedface_core.modules.adapter import FaceAdapter

ENCODER = EncoderConfig(config={"hidden_size": 12, "patch_size": 112}, image_size=224)  # five tokens
GRID = (4, 6)
X = torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(2))
Y = torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(3))
NOISE = torch.zeros(2, 4, 8, 12)


def make_adapter(**fields) -> FaceAdapter:
    torch.manual_seed(0)
    adapter = FaceAdapter(AdapterConfig("sd_unet", (SiteConfig("a", 24, 3, 8),), 16, ENCODER, **fields))
    torch.nn.init.normal_(adapter.branches[0].zero_linear.weight, std=0.2)
    return adapter.requires_grad_(False)


def faces(count: int) -> list[Face]:
    states = torch.randn(count, 2, ENCODER.tokens, 12, generator=torch.Generator().manual_seed(4))
    weights = [(1.0, 1.0), (1.0, 0.25), (0.0, 1.0), (1.0, 0.0)]
    kinds = ["concat", "concat", "average", "concat"]
    return [Face(*one) for one in zip(states, weights[:count], kinds[:count], strict=True)]


def added(adapter, face, mask=None, strength: float = 1.0) -> torch.Tensor:
    """What the first branch adds on the two rows."""
    control = FaceControl(face, strength, mask)
    ready = adapter.control_of(face, "cpu", torch.float32, strength=strength, **control.at_latents(NOISE))
    return add_control(adapter, 0, X, Y, [(2, ready)], GRID) - Y


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("fields", [{}, {"self_attention": False}, {"tap": "output"}])
def test_each_region_is_as_if_its_person_were_alone(count: int, fields: dict) -> None:
    adapter, people = make_adapter(**fields), faces(count)
    masks = column_masks(count, 64, 96)
    together = added(adapter, People(tuple(people), masks))
    alone = sum(added(adapter, face, mask[None]) for face, mask in zip(people, masks, strict=True))
    inside = torch.nn.functional.interpolate(masks[None], size=GRID, mode="area")[0].amax(0).flatten() == 1
    together, alone = together[:, inside], alone[:, inside]  # a token on a border sees both
    assert inside.sum() >= 12
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert alone.abs().max() > 0.05


def test_nothing_is_added_outside_all_regions() -> None:
    masks = torch.zeros(2, 8, 12)
    masks[0, :, :4], masks[1, :, 8:] = 1.0, 1.0
    change = added(make_adapter(), People(tuple(faces(2)), masks)).reshape(2, 4, 6, 24)
    assert torch.equal(change[:, :, 2:4], torch.zeros(2, 4, 2, 24))
    assert change[:, :, :2].abs().amin((0, 1, 2)).sum() > 0 and change.isfinite().all()


def test_swapped_people_swap_their_regions() -> None:
    adapter, (first, second), masks = make_adapter(), faces(2), column_masks(2, 8, 12)
    one, other = People((first, second), masks), People((second, first), masks.flip(0))
    torch.testing.assert_close(added(adapter, one), added(adapter, other), atol=1e-5, rtol=1e-4)


def test_strengths_and_mask_multiply() -> None:
    adapter, people, masks = make_adapter(), tuple(faces(2)), column_masks(2, 8, 12)
    full = added(adapter, People(people, masks))
    left = (masks[0, ::2, ::2].flatten())[None, :, None]
    half = added(adapter, People(people, masks, (0.5, 1.0)))
    torch.testing.assert_close(half, full * (1 - 0.5 * left), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(added(adapter, People(people, masks), masks[:1]), full * left, atol=1e-5, rtol=1e-4)


def test_one_person_everywhere_is_a_face() -> None:
    adapter, (face,) = make_adapter(), faces(1)
    torch.testing.assert_close(added(adapter, People((face,), torch.ones(1, 8, 12))), added(adapter, face))


def test_where_regions_overlap_both_are_seen() -> None:
    adapter, (first, second), everywhere = make_adapter(), faces(2), torch.ones(1, 8, 12)
    both = added(adapter, People((first, second), everywhere.repeat(2, 1, 1)))
    for face in (first, second):
        assert (both - added(adapter, face)).abs().max() > 0.01
    order = added(adapter, People((second, first), everywhere.repeat(2, 1, 1)))
    torch.testing.assert_close(both, order, atol=1e-5, rtol=1e-4)


def test_area_of_a_prompt_cuts_the_regions() -> None:
    adapter, people, masks = make_adapter(), tuple(faces(2)), column_masks(2, 8, 12)
    face = People(people, masks)
    control = adapter.control_of(face, "cpu", torch.float32, **FaceControl(face).at_latents(NOISE))
    cut = control.cropped((4, 6, 0, 6))  # the right half, where only the second person is
    assert cut.regions.shape == (2, 4, 6) and not cut.regions[0].any() and cut.regions[1].all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda f: People(tuple(f), torch.ones(3, 8, 8)), "2 faces, 3 regions"),
        (lambda f: People(tuple(f), torch.ones(2, 8, 8), (1.0,)), "1 strengths"),
        (lambda f: People((), torch.ones(0, 8, 8)), "0 faces"),
        (lambda f: People((f[0], Face(f[1].hidden, encoder="other")), torch.ones(2, 8, 8)), "different encoders"),
        (lambda f: People((f[0], Face(f[1].hidden, (0.0, 0.0))), torch.ones(2, 8, 8)), "face 2 of 2 has no reference"),
    ],
)
def test_mistakes(build, message: str) -> None:
    with pytest.raises(FeedFaceError, match=message):
        build(faces(2))


def test_regions_of_another_shape_are_refused() -> None:
    with pytest.raises(FeedFaceError, match="face mask is 8 × 64"):
        FaceControl(People(tuple(faces(2)), torch.ones(2, 64, 8))).at_latents(NOISE)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [64, 100, 7])
def test_columns_share_the_width(count: int, width: int) -> None:
    masks = column_masks(count, 5, width)
    assert torch.equal(masks.sum(0), torch.ones(5, width))
    widths = masks[:, 0].sum(1)
    assert widths.max() - widths.min() <= 1


def test_boxes_do_not_overlap_and_grow() -> None:
    masks = box_masks("[[10, 10, 30, 30], [34, 10, 54, 30]]", 2.0, 40, 64)
    assert masks.sum(0).max() == 1
    assert masks[0, 20, 1] == 1 and masks[0, 20, 31] == 1 and masks[1, 20, 33] == 1 and masks[0, 39, 60] == 0
    with pytest.raises(FeedFaceError, match=r"box 2 \(300, 0, 340, 40\) lies outside the picture of 64 × 40"):
        box_masks("[[10, 10, 30, 30], [300, 0, 340, 40]]", 1.0, 40, 64)


@pytest.mark.parametrize("boxes", ["[]", "[[]]"])
def test_no_boxes_are_no_regions(boxes: str) -> None:
    with pytest.raises(FeedFaceError, match="^boxes: "):
        box_masks(boxes, 1.5, 40, 64)


@pytest.mark.parametrize("size", [(16384, 16384), (16384, 16), (3000, 2000)])
def test_regions_of_a_large_picture_stay_small(size: tuple[int, int]) -> None:
    """A mask serves in any resolution of the picture's shape: 6 of 16384 × 16384 would take 6 GB."""
    height, width = size
    noise = torch.zeros(1, 4, height // 8, width // 8)
    for masks in (column_masks(6, height, width), box_masks(f"[[0, 0, {width}, {height}]]", 1.0, height, width)):
        assert masks.numel() <= 6 * 2048 * 2048 and masks.sum(0).min() == masks.sum(0).max() == 1
        ready = FaceControl(People(tuple(faces(1) * len(masks)), masks)).at_latents(noise)["regions"]
        assert ready.shape == (len(masks), height // 8, width // 8)


def test_best_assignment() -> None:
    people = faces(4)
    order = [2, 0, 3, 1]
    found = torch.stack([people[index].hidden.mean(0) for index in order])
    found = Face(found + 0.01 * torch.randn(4, ENCODER.tokens, 12))
    chosen, likeness = match_faces(people, found)
    assert chosen == order and min(likeness) > 0.9
    with pytest.raises(FeedFaceError, match="3 faces were found for 4 people"):
        match_faces(people, Face(found.hidden[:3]))


@pytest.mark.parametrize("found", [Face(torch.ones(2, 5, 16)), Face(torch.ones(2, 5, 12), encoder="other")])
def test_faces_of_another_encoder_are_not_matched(found: Face) -> None:
    with pytest.raises(FeedFaceError, match="face_1 comes from encoder unknown .*, found from"):
        match_faces(faces(2), found)


def test_drawing_has_a_colour_for_each() -> None:
    picture = draw_regions(column_masks(3, 48, 96), ["face 1", "face 2", "face 3"])
    assert picture.shape == (48, 96, 3)
    assert len({tuple((picture[1, x] * 255).int().tolist()) for x in (1, 48, 94)}) == 3


def test_the_grid_of_a_level_follows_from_its_tokens() -> None:
    """As a U-Net halves: 5 × 7 latents, then 3 × 4, then 2 × 2."""
    assert [grid_at((5, 7), tokens) for tokens in (35, 12, 4)] == [(5, 7), (3, 4), (2, 2)]
    with pytest.raises(FeedFaceError, match="10 tokens are no level of a U-Net with latents of 7 × 5"):
        grid_at((5, 7), 10)
