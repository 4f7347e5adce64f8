"""Likeness with a gradient: a face crop → a unit vector near those of the person's other photos.

The cosine of two such vectors pulls a picture towards a person: in training and in sampling, through the predicted
clean picture. The recognisers of :mod:`feedface_core.faces.recognisers` judge finished pictures; most have no gradient.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import EncoderConfig
from ..errors import FeedFaceError, located
from ..state_dict import check_tensors, read_state_dict


def mean_vectors(vectors: Tensor, counts: Sequence[int], weights: Sequence[float] | None = None) -> Tensor:
    """Unit vectors ``(R, D)`` of the references of F faces → one unit vector of each face ``(F, D)``.

    Args:
        counts: references of each face, R in all.
        weights: one for each reference; None for equal ones.
    """
    if weights is not None:
        vectors = vectors * vectors.new_tensor(list(weights))[:, None]
    return functional.normalize(torch.stack([own.sum(0) for own in vectors.split(list(counts))]), dim=-1)


def pull(
    clean: Tensor,
    crops_of: Callable[[Tensor], Tensor],
    likeness: Likeness,
    references: Tensor,
    distances: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Predicted clean latents, moved towards a person: a step up the gradient of the likeness (identity guidance).

    The gradient says where to, ``distances`` how far: near a person's likeness it is small, and large elsewhere, for no
    reason that a picture shows.

    Args:
        clean: ``(N, C, h, w)``; also of ComfyUI's inference mode.
        crops_of: latents → face crops ``(N, 3, S, S)`` in 0…1, with a gradient.
        references: ``(N, D)`` unit vectors, or ``(1, D)`` for all.
        distances: Euclidean length of each picture's step.

    Returns:
        The latents, in their number format, and the likeness ``(N,)`` before the step.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(clean.device.type, enabled=False):
        latents = clean.float().clone().requires_grad_()
        found = likeness.vectors(crops_of(latents))
        cosines = (found * references.clone().to(found)).sum(1)
        (gradient,) = torch.autograd.grad(cosines.sum(), latents)
        step = functional.normalize(gradient.flatten(1), dim=1).view_as(gradient).nan_to_num()
        step = step * step.new_tensor(list(distances)).view(-1, 1, 1, 1)
        return (latents.detach() + step).to(clean.dtype), cosines.detach()


class Likeness(ABC):
    """A frozen recogniser whose input has a gradient.

    Attributes:
        size: side of the crops it sees, in pixels.
        module: the network, in evaluation mode, without gradients of its own.
    """

    size: int
    module: nn.Module

    def to(self, device: torch.device | str) -> Likeness:
        """Move the network."""
        self.module.to(device)
        return self

    def vectors(self, crops: Tensor) -> Tensor:
        """Face crops ``(N, 3, H, W)`` in 0…1 → unit vectors ``(N, D)``; resized when they are not of :attr:`size`."""
        if tuple(crops.shape[-2:]) != (self.size, self.size):
            size = (self.size, self.size)
            crops = functional.interpolate(crops, size=size, mode="bicubic", antialias=True, align_corners=False)
        return functional.normalize(self._features(crops.clamp(0, 1)).float(), dim=-1)

    @abstractmethod
    def _features(self, crops: Tensor) -> Tensor:
        """Crops of :attr:`size` → features ``(N, D)`` of any length."""


class EncoderLikeness(Likeness):
    """The face encoder of an adapter itself: the class token, at the layer that the adapter reads. So the
    hidden states of a face are all that is needed of its references.

    Args:
        module: a transformers ``CLIPVisionModel``.
        config: how crops are prepared for it, and its layer.
    """

    def __init__(self, module: nn.Module, config: EncoderConfig) -> None:
        self.module, self.config, self.size = module, config, config.image_size

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states ``(N, T, E)`` → unit vectors ``(N, E)``."""
        return functional.normalize(hidden[:, 0].float(), dim=-1)

    def _features(self, crops: Tensor) -> Tensor:
        config, weight = self.config, next(self.module.parameters())
        mean, std = (crops.new_tensor(values).view(1, 3, 1, 1) for values in (config.image_mean, config.image_std))
        pixels = ((crops - mean) / std).to(weight.device, weight.dtype)
        return self.module(pixel_values=pixels, output_hidden_states=True).hidden_states[config.layer][:, 0]


class FacenetLikeness(Likeness):
    """facenet-pytorch's ``InceptionResnetV1`` (Schroff et al. 2015; weights of David Sandberg) from a file.

    Args:
        path: ``20180402-114759-vggface2.pt``, ``…-casia-webface.pt``, or the same as safetensors.

    Raises:
        FeedFaceError: facenet-pytorch is not installed, or the file holds another network.
    """

    size = 160

    def __init__(self, path: str | os.PathLike) -> None:
        try:
            from facenet_pytorch import InceptionResnetV1
        except ImportError as error:
            raise FeedFaceError(f'the recogniser facenet needs the package facenet-pytorch ({error}); "pip install '
                                'facenet-pytorch==2.5.3 --no-deps"') from error  # fmt: skip
        network, (tensors, _) = InceptionResnetV1(pretrained=None), read_state_dict(path)
        unused = ("logits.", "num_batches_tracked")  # the classes it was trained on, and counters
        tensors = {name: one for name, one in tensors.items() if not any(part in name for part in unused)}
        wanted = {name: tuple(one.shape) for name, one in network.state_dict().items() if unused[1] not in name}
        with located(path):
            check_tensors("facenet-pytorch's InceptionResnetV1", wanted, tensors)
        network.load_state_dict(tensors, strict=False)
        self.module = network.float().eval().requires_grad_(False)

    def _features(self, crops: Tensor) -> Tensor:
        return self.module((crops.float() * 255.0 - 127.5) / 128.0)
