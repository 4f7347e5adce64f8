"""Pictures of the held-out people from the small model, and what the examiner says about them.

For person i and prompt p the noise and the caption depend on ``(seed, i, p)`` alone, so every row of the benchmark
draws the same pictures but for what the row changes, and differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from feedface_core.conditioning import FaceControl, combine_references
from feedface_core.files.adapter_file import load_adapter
from feedface_core.files.atomic import write_safetensors
from feedface_core.guidance import Guidance
from feedface_core.modules.adapter import FaceAdapter
from feedface_core.modules.encoder import build_encoder, encode
from trainer.config import ModelSettings
from trainer.models.frozen_model import load_frozen_model
from trainer.training.sampling import sample

from . import system
from .drawing import People
from .identity import crops
from .people import ATTRIBUTES, Scene, caption, detector_box, scene_of

REFERENCES = 4  # the first pictures of a person are references, the others the gallery that the examiner knows


@dataclass(frozen=True)
class Request:
    """One picture to draw: who, the caption's scene, and the noise's seed."""

    person: int
    scene: Scene
    seed: int


def requests(people: int, prompts: int, seed: int = 0) -> list[Request]:
    """``prompts`` requests for each person, in the order of the people."""
    return [
        Request(i, scene_of(np.random.default_rng([seed, 77, i, p])), seed * 1_000_003 + i * 101 + p)
        for i in range(people)
        for p in range(prompts)
    ]


class SmallModel:
    """The frozen small model with one adapter at a time.

    Args:
        people: the held-out people.
        identities: how many of them.
        folder: the diffusers folder.
    """

    def __init__(self, people: People, identities: int, folder: Path = system.FOLDER):
        self.frozen = load_frozen_model(ModelSettings(base=str(folder), precision="fp32"))
        self.people, self.identities = people, identities
        self.adapter: FaceAdapter | None = None
        self._hidden: dict[str, Tensor] = {}

    def use(self, path: Path) -> None:
        """Attaches the adapter of a file and encodes the references of everybody with its encoder."""
        found = load_adapter(path)
        self.adapter = found.build(torch.float32)
        self.frozen.attach(self.adapter)
        settings = found.config.encoder
        encoder = build_encoder(settings, found.encoder_tensors)
        index = self.people.pictures_of(self.identities)[:, :REFERENCES].ravel()
        pictures, heads = self.people.pixels(index), [self.people.records[i]["box"] for i in index]
        for crop, boxes in (("head", heads), ("detector", [detector_box(box) for box in heads])):
            faces = crops(pictures, torch.tensor(boxes), settings.image_size)  # (N, 3, S, S) in −1…1
            hidden = encode(encoder, settings, (faces.movedim(1, -1) + 1) / 2)
            self._hidden[crop] = hidden.unflatten(0, (self.identities, REFERENCES))  # (people, references, T, E)

    def faces(self, persons: Sequence[int], references: int, combination: str, crop: str = "head") -> FaceControl:
        """The faces of several people, a row for each."""
        hidden = self._hidden[crop][list(persons), :references]  # (people, references, T, E)
        tokens, bias = combine_references(hidden.flatten(0, 1), [references] * len(persons), combination)
        with torch.autocast("cpu", torch.bfloat16):
            return self.adapter.control(self.adapter.project(tokens), bias)

    @torch.no_grad()
    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Pictures ``(N, 3, S, S)`` in −1…1 through the autoencoder: the most that any drawing can show."""
        return self.frozen.decode(self.frozen.sample_latents(self.frozen.encode_pixels(pictures)))

    @torch.no_grad()
    def draw(
        self,
        asked: Sequence[Request],
        guidance: Guidance,
        references: int = 0,
        combination: str = "concat",
        crop: str = "head",
        steps: int = 20,
        batch: int = 32,
    ) -> Tensor:
        """Pictures ``(N, 3, S, S)`` in −1…1; with ``references`` 0 without a face, under the same guidance.

        ``crop`` is how the references are cropped: the whole ``head``, or the smaller box of a face ``detector``.
        """
        shape, done = self.frozen.latent_shape(self.people.size, self.people.size), []
        for first in range(0, len(asked), batch):
            chunk = asked[first : first + batch]
            face = self.faces([r.person for r in chunk], references, combination, crop) if references else None
            text = self.frozen.encode_text([caption(r.scene) for r in chunk])
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in chunk])
            with torch.autocast("cpu", torch.bfloat16):
                latents = sample(self.frozen, noise, text, guidance, face, steps=steps)
            done.append(self.frozen.decode(latents))
        return torch.cat(done)


class Examination:
    """The examiner and the people that it knows.

    Args:
        centre: ``(D,)`` mean of the embeddings of the people's pictures.
        gallery: ``(people, D)`` one direction from the centre for each.
        folder: the small model.
    """

    def __init__(self, centre: Tensor, gallery: Tensor, folder: Path = system.FOLDER):
        self.examiner, self.masks = system.load_examiner(folder)
        self.centre, self.gallery = centre.float(), gallery.float()

    @classmethod
    @torch.no_grad()
    def of(cls, people: People, identities: int, folder: Path = system.FOLDER) -> Examination:
        """Knows the pictures after the references of the first ``identities`` people."""
        examiner, _ = system.load_examiner(folder)
        index = people.pictures_of(identities)[:, REFERENCES:]
        known = torch.stack([examiner(people.pixels(person))[0] for person in index])  # (people, pictures, D)
        centre = known.flatten(0, 1).mean(0)
        return cls(centre, F.normalize(F.normalize(known - centre, dim=-1).mean(1), dim=-1), folder)

    @classmethod
    def load(cls, folder: Path = system.FOLDER) -> Examination:
        """Knows the people of the demo, whose gallery is published."""
        return cls(**load_file(folder / "examiner" / "gallery.safetensors"), folder=folder)

    def save_gallery(self, folder: Path) -> None:
        """Writes what :meth:`load` reads."""
        gallery = {"centre": self.centre.half(), "gallery": self.gallery.half()}
        write_safetensors(folder / "examiner" / "gallery.safetensors", gallery, {})

    @torch.no_grad()
    def examine(self, pictures: Tensor, batch: int = 200) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean-centred cosine ``(N, people)`` of each picture to everybody, and the attributes read from it, each
        ``(N,)``."""
        embeddings, logits = zip(*(self.examiner(chunk) for chunk in pictures.split(batch)), strict=True)
        read = {name: torch.cat([chunk[name] for chunk in logits]).argmax(1) for name in ATTRIBUTES}
        return F.normalize(torch.cat(embeddings) - self.centre, dim=-1) @ self.gallery.T, read

    @torch.no_grad()
    def scores(self, pictures: Tensor, asked: Sequence[Request], plain: Tensor) -> dict[str, np.ndarray]:
        """For each picture ``top1`` (0 or 1), ``similarity`` (mean-centred cosine to the person), ``prompt`` (share
        of the caption's attributes read back) and ``background`` (mean absolute difference from ``plain``, the
        picture of the frozen model, outside the heads of both; 0…1).
        """
        person = torch.tensor([r.person for r in asked])
        near, read = self.examine(pictures)
        wanted = {a: torch.tensor([v.index(r.scene[a]) for r in asked]) for a, v in ATTRIBUTES.items()}
        followed = torch.stack([(read[a] == wanted[a]).float() for a in ATTRIBUTES])
        outside = 1 - self.heads(torch.cat([pictures, plain])).unflatten(0, (2, len(asked))).amax(0)  # (N, 1, S, S)
        apart = (pictures - plain).abs().mean(1, keepdim=True) / 2
        drift = (apart * outside).sum((1, 2, 3)) / outside.sum((1, 2, 3)).clamp(min=1)
        return {
            "top1": (near.argmax(1) == person).float().numpy(),
            "similarity": near[torch.arange(len(person)), person].numpy(),
            "prompt": followed.mean(0).numpy(),
            "background": drift.numpy(),
        }

    def heads(self, pictures: Tensor) -> Tensor:
        """Masks ``(N, 1, S, S)`` of head and hair as the mask reader sees them, a pixel of the small mask wider."""
        read = torch.cat([self.masks(chunk) for chunk in pictures.split(200)]) > 0
        wider = F.max_pool2d(read.float(), 3, 1, 1)
        return F.interpolate(wider, scale_factor=2, mode="nearest")

    def compare(self, pictures: Tensor, person: int) -> list[tuple[float, int]]:
        """For each picture its mean-centred cosine to a person, and how many people are nearer (0: it is the
        person)."""
        near, _ = self.examine(pictures)
        return [(float(row[person]), int((row > row[person]).sum())) for row in near]


def bootstrap(values: np.ndarray, persons: np.ndarray, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` when people, not pictures, are drawn again."""
    means = np.array([values[persons == i].mean() for i in np.unique(persons)])
    drawn = np.random.default_rng(seed).integers(len(means), size=(rounds, len(means)))
    low, high = np.percentile(means[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)
