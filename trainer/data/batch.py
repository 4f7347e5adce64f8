"""Samples of one forward pass, as one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
        crops: face crops ``(R, S, S, 3)`` in 0…1 in the order of the samples; None with a cache or with R =
            0.
        hidden: cached hidden states ``(R, T, E)``, or None likewise.
        reference_counts: references of each sample; 0 where the face is dropped.
        masks: ``(B, 1, h, w)`` in 0…1 over latent cells.
        noise: ``(B, *latent)`` standard normal.
        latent_noise: the same, for sampling the latents from their moments.
        timesteps: ``(B,)`` int64.
        drop_face, drop_text, standard_loss: a decision for each sample, as plain lists: no device is read
            back.
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
    reference_counts: list[int]
    masks: Tensor
    noise: Tensor
    latent_noise: Tensor
    timesteps: Tensor
    drop_face: list[bool]
    drop_text: list[bool]
    standard_loss: list[bool]
    unreadable: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.ids)

    def _with_tensors(self, change) -> Batch:
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = change(value)
            elif isinstance(value, dict):
                value = {name: change(tensor) for name, tensor in value.items()}
            values[field.name] = value
        return Batch(**values)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Samples → one :class:`Batch`."""

    def stack(name: str) -> Tensor | None:
        return torch.stack([sample[name] for sample in samples]) if name in samples[0] else None

    def chain(name: str) -> Tensor | None:
        parts = [tensor for sample in samples for tensor in sample.get(name, ())]
        return torch.stack(parts) if parts else None

    text = None
    if "text" in samples[0]:
        text = {name: torch.stack([s["text"][name] for s in samples]) for name in samples[0]["text"]}
    draws: list[Draws] = [sample["draws"] for sample in samples]
    return Batch(
        ids=[sample["id"] for sample in samples],
        visits=[sample["visit"] for sample in samples],
        captions=[sample["caption"] for sample in samples],
        text=text,
        pixels=stack("pixels"),
        moments=stack("moments"),
        crops=chain("crops"),
        hidden=chain("hidden"),
        reference_counts=[len(draw.references) for draw in draws],
        masks=stack("mask"),
        noise=stack("noise"),
        latent_noise=stack("latent_noise"),
        timesteps=torch.tensor([draw.timestep for draw in draws], dtype=torch.int64),
        drop_face=[draw.drop_face for draw in draws],
        drop_text=[draw.drop_text for draw in draws],
        standard_loss=[draw.standard_loss for draw in draws],
        unreadable=[photo for sample in samples for photo in sample["unreadable"]],
    )
