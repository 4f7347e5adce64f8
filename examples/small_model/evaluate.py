"""Pictures of the held-out people from the small system, and what the examiner says about them.

For person i and prompt p the noise and the caption depend on ``(seed, i, p)`` alone, so every row of the benchmark
draws the same pictures but for what the row changes, and differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from feedface_core.conditioning import FaceControl, combine_references
from feedface_core.files.adapter_file import load_adapter
from feedface_core.guidance import Guidance
from feedface_core.modules.adapter import FaceAdapter
from feedface_core.modules.encoder import build_encoder, encode
from trainer.config import ModelSettings
from trainer.models.stable_diffusion import StableDiffusion

from . import system
from .denoiser import scheduler
from .drawing import People
from .identity import crops
from .loop import pixels
from .people import ATTRIBUTES, Scene, detector_box, scene_of

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


class SmallSystem:
    """The frozen small system with one adapter at a time.

    Args:
        folder: the diffusers folder.
        people: the held-out people.
        identities: how many of them.
    """

    def __init__(self, people: People, identities: int, folder: Path = system.FOLDER):
        self.base = StableDiffusion.load(ModelSettings(base=str(folder), precision="fp32"))
        self.people, self.identities = people, identities
        self.per_person = len(people.records) // len({r["identity"] for r in people.records})
        self.adapter: FaceAdapter | None = None
        self._hidden: dict[str, Tensor] = {}

    def use(self, path: Path) -> None:
        """Attaches the adapter of a file and encodes the references of everybody with its encoder."""
        found = load_adapter(path)
        self.adapter = found.build(torch.float32).eval().requires_grad_(False)
        self.base.attach(self.adapter)
        settings = found.config.encoder
        encoder = build_encoder(settings, found.encoder_tensors)
        index = [i * self.per_person + r for i in range(self.identities) for r in range(REFERENCES)]
        pictures, heads = pixels(self.people.pictures[index]), [self.people.records[i]["box"] for i in index]
        for cut, boxes in (("head", heads), ("detector", [detector_box(box) for box in heads])):
            faces = crops(pictures, torch.tensor(boxes), settings.image_size)  # (N, 3, S, S) in -1…1
            hidden = encode(encoder, settings, (faces.movedim(1, -1) + 1) / 2)
            self._hidden[cut] = hidden.unflatten(0, (self.identities, REFERENCES))  # (people, references, T, E)

    def faces(self, persons: Sequence[int], references: int, combination: str, cut: str = "head") -> FaceControl:
        """The faces of several people, a row for each."""
        hidden = self._hidden[cut][list(persons), :references]  # (people, references, T, E)
        tokens, bias = combine_references(hidden.flatten(0, 1), [references] * len(persons), combination)
        with torch.autocast("cpu", torch.bfloat16):
            return self.adapter.control(self.adapter.project(tokens), bias)

    @torch.no_grad()
    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Pictures ``(N, 3, 64, 64)`` in -1…1 through the autoencoder: the most that any drawing can show."""
        return self.base.decode(self.base.sample_latents(self.base.encode_pixels(pictures)))

    @torch.no_grad()
    def draw(
        self,
        asked: Sequence[Request],
        form: Guidance,
        references: int = 0,
        combination: str = "concat",
        cut: str = "head",
        steps: int = 20,
        batch: int = 32,
    ) -> Tensor:
        """Pictures ``(N, 3, 64, 64)`` in -1…1; with ``references`` 0 without a face, under the same guidance.

        ``cut`` is how the references are cropped: the whole ``head``, or the smaller box of a face ``detector``.
        """
        done = []
        for at in range(0, len(asked), batch):
            part = asked[at : at + batch]
            face = self.faces([r.person for r in part], references, combination, cut) if references else None
            text = self.base.encode_text([r.scene.caption() for r in part])["states"]
            null = self.base.null_text()["states"].expand_as(text)
            names = form.needed
            states = {"states": torch.cat([text if n in ("text", "both") else null for n in names])}
            rows = [(len(part), face if n in ("face", "both") else None) for n in names]
            shape = self.base.latent_shape(64, 64)
            x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in part])
            schedule = scheduler()
            schedule.set_timesteps(steps)
            for t in schedule.timesteps:
                many = torch.cat([x] * len(names))
                with torch.autocast("cpu", torch.bfloat16):
                    v = self.base.predict(many, t.expand(len(many)), states, rows if face else None)
                guided = form.combine(dict(zip(names, v.float().chunk(len(names)), strict=True)))
                x = schedule.step(guided, t, x).prev_sample
            done.append(self.base.decode(x))
        return torch.cat(done)


class Examination:
    """The examiner with the gallery of the held-out people.

    Args:
        people: the held-out people; the pictures after the references are the gallery.
        identities: how many of them take part.
    """

    def __init__(self, people: People, identities: int, folder: Path = system.FOLDER):
        self.examiner, self.masks = system.load_examiner(folder)
        each = len(people.records) // len({r["identity"] for r in people.records})
        with torch.no_grad():
            known = self.embed(pixels(people.pictures[: identities * each])).unflatten(0, (identities, each))
        gallery = known[:, REFERENCES:]  # (people, pictures, D)
        self.centre = gallery.flatten(0, 1).mean(0)
        self.gallery = F.normalize(F.normalize(gallery - self.centre, dim=-1).mean(1), dim=-1)  # (people, D)

    def embed(self, pictures: Tensor, batch: int = 200) -> Tensor:
        """Identity embeddings ``(N, D)``."""
        return torch.cat([self.examiner(part)[0] for part in pictures.split(batch)])

    @torch.no_grad()
    def nearness(self, pictures: Tensor) -> Tensor:
        """Mean-centred cosine ``(N, people)`` of each picture to everybody."""
        return F.normalize(self.embed(pictures) - self.centre, dim=-1) @ self.gallery.T

    @torch.no_grad()
    def scores(self, pictures: Tensor, asked: Sequence[Request], plain: Tensor) -> dict[str, np.ndarray]:
        """For each picture ``top1`` (0 or 1), ``similarity`` (mean-centred cosine to the person), ``prompt`` (share
        of the caption's attributes read back) and ``background`` (mean absolute difference from ``plain``, the
        picture of the frozen model, outside the heads of both; 0…1).
        """
        person = torch.tensor([r.person for r in asked])
        near = self.nearness(pictures)
        logits = [self.examiner(part)[1] for part in pictures.split(200)]
        told = []
        for name, values in ATTRIBUTES.items():
            read = torch.cat([part[name] for part in logits]).argmax(1)
            told.append((read == torch.tensor([values.index(getattr(r.scene, name)) for r in asked])).float())
        outside = 1 - self.heads(torch.cat([pictures, plain])).unflatten(0, (2, len(asked))).amax(0)  # (N, 1, 64, 64)
        apart = (pictures - plain).abs().mean(1, keepdim=True) / 2
        drift = (apart * outside).sum((1, 2, 3)) / outside.sum((1, 2, 3)).clamp(min=1)
        return {
            "top1": (near.argmax(1) == person).float().numpy(),
            "similarity": near[torch.arange(len(person)), person].numpy(),
            "prompt": torch.stack(told).mean(0).numpy(),
            "background": drift.numpy(),
        }

    def heads(self, pictures: Tensor) -> Tensor:
        """Masks ``(N, 1, 64, 64)`` of head and hair as the mask reader sees them, a pixel of the small mask wider."""
        read = torch.cat([self.masks(part) for part in pictures.split(200)]) > 0
        wider = F.max_pool2d(read.float(), 3, 1, 1)
        return F.interpolate(wider, scale_factor=2, mode="nearest")


def bootstrap(values: np.ndarray, persons: np.ndarray, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` when people, not pictures, are drawn again."""
    means = np.array([values[persons == i].mean() for i in np.unique(persons)])
    drawn = np.random.default_rng(seed).integers(len(means), size=(rounds, len(means)))
    low, high = np.percentile(means[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)
