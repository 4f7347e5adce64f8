"""Samples of one forward pass, as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .faces import Place

if TYPE_CHECKING:
    from .dataset import Draws


@dataclass
class Batch:
    """Samples of one forward pass, B of them with R references in all.

    Args:
        ids: sample ids.
        visits: how often each sample came before.
        captions: texts, empty where dropped.
        text: cached text states, each ``(B, …)``, the empty caption's where dropped; or None.
        pixels: ``(B, 3, H, W)`` in −1…1, or None with a cache.
        moments: cached moments ``(B, …)``, or None.
        crops: face crops ``(R, S, S, 3)`` in 0…1 in the order of the samples; None with R = 0, or with a cache unless a
            recogniser has to see them.
        hidden: cached hidden states ``(R, T, E)``, or None likewise.
        backgrounds: photos without their face ``(G, S, S, 3)`` in 0…1 of the samples that have one, in their order;
            None with a cache or with G = 0.
        background_hidden: cached hidden states ``(G, T, E)``, or None likewise.
        reference_counts: references of each sample; 0 where the face is dropped.
        masks: ``(B, 1, h, w)`` in 0…1 over latent cells.
        noise: ``(B, *latent)`` standard normal.
        latent_noise: the same, for sampling the latents from their moments.
        timesteps: ``(B,)`` int64.
        drop_face, drop_background, drop_text, standard_loss: a decision for each sample, as plain lists: no device is
            read back.
        people: for each sample the references of each person in it; with several, a picture token sees only its own.
        faces: where these people are; empty where nobody asks.
        unreadable: id and reason of each photo that could not be read; their samples are replaced by others.
    """

    ids: list[str]
    visits: list[int]
    captions: list[str]
    text: dict[str, Tensor] | None
    pixels: Tensor | None
    moments: Tensor | None
    crops: Tensor | None
    hidden: Tensor | None
    backgrounds: Tensor | None
    background_hidden: Tensor | None
    reference_counts: list[int]
    masks: Tensor
    noise: Tensor
    latent_noise: Tensor
    timesteps: Tensor
    drop_face: list[bool]
    drop_background: list[bool]
    drop_text: list[bool]
    standard_loss: list[bool]
    people: list[tuple[int, ...]]
    faces: list[tuple[Place, ...]]
    unreadable: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.ids)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: change(tensor) for name, tensor in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return Batch(**{name: changed(value) for name, value in vars(self).items()})

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader."""
        return self._map(lambda tensor: tensor.pin_memory())


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Samples → one :class:`Batch`."""

    def stack(name: str) -> Tensor | None:
        return torch.stack([sample[name] for sample in samples]) if name in samples[0] else None

    def chain(name: str) -> Tensor | None:
        tensors = [tensor for sample in samples for tensor in sample.get(name, ())]
        return torch.stack(tensors) if tensors else None

    def some(name: str) -> Tensor | None:
        tensors = [sample[name] for sample in samples if name in sample]
        return torch.stack(tensors) if tensors else None

    def each(name: str) -> list[Any]:
        return [sample[name] for sample in samples]

    text = {name: torch.stack([own[name] for own in each("text")]) for name in samples[0].get("text", ())}
    draws: list[Draws] = each("draws")
    return Batch(
        ids=each("id"),
        visits=each("visit"),
        captions=each("caption"),
        text=text or None,
        pixels=stack("pixels"),
        moments=stack("moments"),
        crops=chain("crops"),
        hidden=chain("hidden"),
        backgrounds=some("background"),
        background_hidden=some("background_hidden"),
        reference_counts=[len(draw.references) for draw in draws],
        masks=stack("mask"),
        noise=stack("noise"),
        latent_noise=stack("latent_noise"),
        timesteps=torch.tensor([draw.timestep for draw in draws], dtype=torch.int64),
        drop_face=[draw.drop_face for draw in draws],
        drop_background=[draw.drop_background for draw in draws],
        drop_text=[draw.drop_text for draw in draws],
        standard_loss=[draw.standard_loss for draw in draws],
        people=[draw.people for draw in draws],
        faces=[draw.faces for draw in draws],
        unreadable=[photo for photos in each("unreadable") for photo in photos],
    )
