"""Where in a picture each of several people is: masks from columns or boxes, and which face belongs where."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from ..arithmetic import check_same_encoder
from ..conditioning import Face
from ..errors import FeedFaceError
from .box import Box, faces_from_json

BOX_SCALE = 1.5
"""Sides of a region over those of its face's box: a head is larger than a face."""
_LONGEST_SIDE = 2048  # of a mask, which serves in any resolution of the picture's shape


def mask_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the masks of a picture: its own, or its shape with sides of at most 2048."""
    shrink = max(height, width, _LONGEST_SIDE) / _LONGEST_SIDE
    return max(1, round(height / shrink)), max(1, round(width / shrink))


def column_masks(count: int, height: int, width: int) -> Tensor:
    """``(count, h, w)`` of :func:`mask_size`: columns of equal width, from left to right."""
    height, width = mask_size(height, width)
    owner = torch.arange(width) * count // width  # (width,)
    return functional.one_hot(owner, count).T.float()[:, None, :].expand(-1, height, -1).contiguous()


def box_masks(boxes: str, scale: float, height: int, width: int) -> Tensor:
    """Boxes as text → ``(R, h, w)`` of :func:`mask_size`; where boxes overlap, a pixel belongs to the one whose centre
    is nearest.

    Args:
        boxes: as :func:`faces_from_json` reads them, in pixels of the picture.
        scale: sides of a region over those of its box: a head is larger than a face.
        height, width: of the picture.

    Raises:
        FeedFaceError: not boxes, none at all, or a box outside the picture.
    """
    faces = faces_from_json(boxes, 1)[0]
    if not faces:
        raise FeedFaceError("boxes: none are given; expected one for each face, for example [[40, 30, 120, 130]]")
    return region_masks([face.box for face in faces], scale, height, width)


def region_masks(boxes: Sequence[Box], scale: float, height: int, width: int) -> Tensor:
    """The same for boxes that have been read.

    Raises:
        FeedFaceError: a box whose middle lies outside the picture.
    """
    regions, distances = [], []
    down_to, across_to = mask_size(height, width)
    rows = (torch.arange(down_to)[:, None] + 0.5) * (height / down_to)  # centres, in pixels of the picture
    columns = (torch.arange(across_to)[None, :] + 0.5) * (width / across_to)
    for number, box in enumerate(boxes, 1):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        across, down = ((box[2] - box[0]) * scale / 2, (box[3] - box[1]) * scale / 2)
        across, down = (columns - x).abs() / across, (rows - y).abs() / down
        if not 0 <= x <= width or not 0 <= y <= height:
            found = ", ".join(f"{value:g}" for value in box)
            raise FeedFaceError(f"boxes: box {number} ({found}) lies outside the picture of {width} × {height} pixels")
        regions.append(torch.maximum(across, down) <= 1.0)
        distances.append(across**2 + down**2)
    nearest = torch.stack(distances).argmin(0)
    return torch.stack([region & (nearest == index) for index, region in enumerate(regions)]).float()


def match_faces(faces: Sequence[Face], found: Face) -> tuple[list[int], list[float]]:
    """Which face belongs to which of the faces found in a first pass: the assignment of greatest likeness (Hungarian).

    Args:
        faces: of R people.
        found: the faces found as its R references, one for each region.

    Returns:
        For each region the index of its face, and their likeness −1…1: the cosine of the class tokens, from whose mean
        over all the faces they are measured.

    Raises:
        FeedFaceError: another number of faces found, or faces of different encoders.
    """
    from scipy.optimize import linear_sum_assignment

    count = len(found.hidden)
    if len(faces) != count:
        raise FeedFaceError(f"{count} faces were found for {len(faces)} people; encode one crop for each region")
    check_same_encoder(**{f"face_{number}": face for number, face in enumerate(faces, 1)}, found=found)
    own = torch.stack([face.hidden[:, 0].float().mean(0) for face in faces])  # (R, E)
    theirs = found.hidden[:, 0].float()  # (R, E)
    centre = torch.cat([own, theirs]).mean(0)
    likeness = functional.normalize(theirs - centre, dim=-1) @ functional.normalize(own - centre, dim=-1).T  # (R, R)
    regions, chosen = linear_sum_assignment(likeness.cpu().numpy(), maximize=True)
    return chosen.tolist(), [float(likeness[region, face]) for region, face in zip(regions, chosen, strict=True)]


def draw_regions(masks: Tensor, labels: Sequence[str]) -> Tensor:
    """Masks ``(R, H, W)`` → a picture ``(H, W, 3)`` with a colour and a label for each."""
    from PIL import Image, ImageDraw

    from .preview import draw_label

    colours = [colorsys.hls_to_rgb(index / len(masks), 0.55, 0.7) for index in range(len(masks))]
    picture = torch.einsum("rhw,rc->hwc", masks.cpu().float(), torch.tensor(colours)).clamp(0, 1)
    image = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
    draw, size = ImageDraw.Draw(image), max(12, image.height // 24)
    for mask, label in zip(masks, labels, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows):
            corner = (float(columns.float().mean()) - size, float(rows.float().mean()) + size)
            draw_label(draw, label, corner, (255, 255, 255), size)
    return torch.from_numpy(numpy.array(image)).float() / 255
