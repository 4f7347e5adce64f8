"""Arithmetic on encoded faces: both, between two, beside one, along a difference; and invented ones.

All but :func:`mix_faces` work on the mean of a face's references, token by token, so the result is a face of one
reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .conditioning import Face, combine_references
from .errors import FeedFaceError, shorten


def mean_tokens(face: Face) -> Tensor:
    """``(1, T, E)``: the references averaged by weight. Raises :class:`FeedFaceError` when all weights are 0."""
    return combine_references(face.hidden.float(), [len(face.hidden)], "weighted_average", face.weights)[0]


def check_same_encoder(**faces: Face) -> None:
    """Raises :class:`FeedFaceError` that names both encoders, of faces by the name of their input."""
    (first, one), *others = faces.items()
    for name, other in others:
        if other.encoder != one.encoder or other.hidden.shape[1:] != one.hidden.shape[1:]:
            raise FeedFaceError(
                f"{first} comes from encoder {one.encoder or 'unknown'} {(*one.hidden.shape[1:],)}, {name} from "
                f"{other.encoder or 'unknown'} {(*other.hidden.shape[1:],)}; encode both with the same adapter"
            )


def mix_faces(face_a: Face, face_b: Face, share: float, combination: str) -> Face:
    """The references of two faces as one face, the second with ``share`` (0…1) of the weight.

    Raises:
        FeedFaceError: faces of different encoders.
    """
    check_same_encoder(face_a=face_a, face_b=face_b)
    if combination == "average":  # the mean within each face; between them the share decides
        combination, own = "weighted_average", [[float(w > 0) for w in face.weights] for face in (face_a, face_b)]
    else:
        own = [face.weights for face in (face_a, face_b)]
    weights = [
        part * weight / (sum(face) or 1.0)
        for face, part in zip(own, (1.0 - share, share), strict=True)
        for weight in face
    ]
    return Face(torch.cat([face_a.hidden, face_b.hidden]), tuple(weights), combination, face_a.encoder)


def interpolate(face_a: Face, face_b: Face, share: float, spherical: bool = False) -> Face:
    """The face ``share`` (0…1, or beyond) of the way from one to another.

    Args:
        spherical: along the arc between the two directions of each token, the lengths linearly (Shoemake 1985): what
            lies between keeps the length that the encoder's states have, where a straight line cuts through.

    Raises:
        FeedFaceError: faces of different encoders.
    """
    check_same_encoder(face_a=face_a, face_b=face_b)
    a, b = mean_tokens(face_a), mean_tokens(face_b)
    mixed = torch.lerp(a, b, share)
    if spherical:
        length_a, length_b = (tokens.norm(dim=-1, keepdim=True) for tokens in (a, b))  # (1, T, 1)
        unit_a, unit_b = (functional.normalize(tokens, dim=-1) for tokens in (a, b))
        angle = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1).acos()
        arc = (((1 - share) * angle).sin() * unit_a + (share * angle).sin() * unit_b) / angle.sin()
        # Between parallel or opposite tokens no arc is told from another.
        mixed = torch.where(angle.sin() > 1e-4, arc * torch.lerp(length_a, length_b, share), mixed)
    return Face(mixed, encoder=face_a.encoder)


def add_noise(face: Face, amount: float, seed: int) -> Face:
    """The face with seeded noise: for each token a random direction, ``amount`` times as long as the token."""
    tokens = mean_tokens(face)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed))
    noise = functional.normalize(noise, dim=-1).to(tokens.device) * tokens.norm(dim=-1, keepdim=True)
    return Face(tokens + amount * noise, encoder=face.encoder)


def add_difference(face: Face, plus: Face, minus: Face, amount: float) -> Face:
    """``face + amount · (plus − minus)``, such as a smile from two photos of somebody else.

    Raises:
        FeedFaceError: faces of different encoders.
    """
    check_same_encoder(face=face, plus=plus, minus=minus)
    return Face(mean_tokens(face) + amount * (mean_tokens(plus) - mean_tokens(minus)), encoder=face.encoder)


@dataclass(frozen=True, eq=False)
class FaceStatistics:
    """Mean and principal components of encoded faces, from which people who do not exist are drawn (Face0, section 4).

    Args:
        mean: ``(T, E)`` of the hidden states.
        components: ``(K, T, E)``, each as long as the faces' standard deviation along it.
    """

    mean: Tensor
    components: Tensor

    @classmethod
    def of(cls, hidden: Tensor, count: int = 32) -> FaceStatistics:
        """The statistics of faces ``(N, T, E)`` with at most ``count`` components; at least two faces."""
        flat = hidden.float().flatten(1)  # (N, T·E)
        mean = flat.mean(0)
        _, lengths, directions = torch.linalg.svd(flat - mean, full_matrices=False)
        components = directions[:count] * (lengths[:count, None] / (len(flat) - 1) ** 0.5)
        return cls(mean.view(hidden.shape[1:]), components.view(-1, *hidden.shape[1:]))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], tokens: int, width: int) -> FaceStatistics | None:
        """From a file's tensors; None without any. Raises :class:`FeedFaceError` for others than these."""
        if not tensors:
            return None
        mean, components = tensors.get("mean"), tensors.get("components")
        shapes = [None if one is None else tuple(one.shape) for one in (mean, components)]
        if len(tensors) != 2 or shapes[0] != (tokens, width) or shapes[1] is None or shapes[1][1:] != (tokens, width):
            found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise FeedFaceError(
                f"statistics: found {shorten(found)}, expected mean {(tokens, width)} and components "
                f"(any, {tokens}, {width})"
            )
        return cls(mean.float(), components.float())

    def draw(self, seed: int, variety: float = 1.0, encoder: str = "") -> Face:
        """A random face: the same for the same seed, in every picture.

        Args:
            variety: 1 is as varied as the faces that were seen, 0 gives their mean.
            encoder: see :class:`Face`.
        """
        noise = torch.randn(len(self.components), generator=torch.Generator().manual_seed(seed))
        return Face((self.mean + variety * torch.einsum("k,kte->te", noise, self.components))[None], encoder=encoder)
