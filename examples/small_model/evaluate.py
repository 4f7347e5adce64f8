"""Pictures of held-out people from the small model, and what the examiner says about them.

For person i and prompt p the caption depends on ``(i, p)`` and the noise on ``(noise, i, p)`` alone, so every row of
the benchmark draws the same pictures but for what the row changes, and differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from feedface_core.conditioning import FaceControl, combine_references
from feedface_core.files.adapter_file import UNET_FILE, load_adapter
from feedface_core.files.atomic import write_safetensors
from feedface_core.guidance import Guidance
from feedface_core.modules.adapter import FaceAdapter
from feedface_core.modules.encoder import build_encoder, encode
from trainer.config import ModelSettings
from trainer.models.frozen_model import load_frozen_model
from trainer.models.precision import cpu_autocast
from trainer.models.unet import changed_by
from trainer.training.sampling import sample

from . import system
from .drawing import People
from .examiner import two_eyes
from .identity import crops
from .people import ATTRIBUTES, Scene, caption, detector_box, scene_of

REFERENCES = 4  # the first pictures of a person are references, the others the gallery that the examiner knows


@dataclass(frozen=True)
class Request:
    """One picture to draw: who, the caption's scene, and the noise's seed."""

    person: int
    scene: Scene
    seed: int


def requests(people: int, prompts: int, noise: int = 0) -> list[Request]:
    """``prompts`` requests for each person, in the order of the people."""
    return [
        Request(i, scene_of(np.random.default_rng([0, 77, i, p])), noise * 1_000_003 + i * 101 + p)
        for i in range(people)
        for p in range(prompts)
    ]


@dataclass(frozen=True)
class Readings:
    """What the examiner says of pictures.

    Attributes:
        near: ``(N, people)`` mean-centred cosine to everybody that it knows.
        attributes, features: ``(N,)`` numbers of the values read, for each of ``ATTRIBUTES`` and of the ``FEATURES``
            that the examiner reads.
        pooled: ``(N, 64)`` of the examiner, for Fréchet distances.
        eyes: ``(N,)`` 1 where there are exactly two similar, level eyes; None without an eye reader.
    """

    near: Tensor
    attributes: dict[str, np.ndarray]
    features: dict[str, np.ndarray]
    pooled: np.ndarray
    eyes: np.ndarray | None


class SmallModel:
    """The frozen small model with one adapter at a time.

    Args:
        folder: the diffusers folder.
    """

    def __init__(self, folder: Path = system.FOLDER):
        self.frozen = load_frozen_model(ModelSettings(base=str(folder), precision="fp32"))
        self.size = system.picture_size(folder)
        self.adapter: FaceAdapter | None = None
        self._hidden: dict[tuple[Path, str], Tensor] = {}
        self._unet: Path | None = None

    def use(self, path: Path) -> None:
        """Attaches the adapter of a file; with a face, the U-Net is as the file beside it makes it, if there is one."""
        found = load_adapter(path)
        beside = found.metadata.get(UNET_FILE)
        self._unet = beside and path.with_name(beside)
        self.adapter, self._hidden = found.build(torch.float32), {}
        self.frozen.attach(self.adapter)
        self.encoder_config = found.config.encoder
        self.encoder = build_encoder(self.encoder_config, found.encoder_tensors)

    @contextmanager
    def without(self, sites: Collection[str]) -> Iterator[None]:
        """Within it the branches at some sites, named canonically, add nothing."""
        own = [site.name for site in self.adapter.config.sites] if sites else []
        branches = [self.adapter.branches[place] for place, name in enumerate(own) if name in sites]
        weights = [weight for branch in branches for weight in branch.zero_linear.parameters()]
        kept = [weight.clone() for weight in weights]
        try:
            for weight in weights:
                weight.zero_()
            yield
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)

    def encode_faces(self, people: People, index: Sequence[int], crop: str = "head") -> Tensor:
        """Hidden states ``(N, T, E)`` of the faces of pictures, in the adapter's encoder."""
        boxes = [people.records[i]["box"] for i in index]
        boxes = [detector_box(box) for box in boxes] if crop == "detector" else boxes
        faces = crops(people.pixels(index), torch.tensor(boxes), self.encoder_config.image_size)  # (N, 3, S, S) in −1…1
        return encode(self.encoder, self.encoder_config, (faces.movedim(1, -1) + 1) / 2)

    def _references(self, people: People, crop: str) -> Tensor:
        """Hidden states ``(people, REFERENCES, T, E)`` of everybody's references."""
        key = (people.folder, crop)
        if key not in self._hidden:
            index = people.pictures_of(len(set(people.identities())))[:, :REFERENCES]
            self._hidden[key] = self.encode_faces(people, index.ravel(), crop).unflatten(0, index.shape)
        return self._hidden[key]

    def references(self, people: People, persons: Sequence[int], count: int, crop: str = "head") -> Tensor:
        """Hidden states ``(rows, count, T, E)`` of the first references of several people, a row for each."""
        return self._references(people, crop)[list(persons), :count]

    def faces(
        self, people: People, persons: Sequence[int], references: int, combination: str, crop: str = "head"
    ) -> FaceControl:
        """The faces of several people, a row for each."""
        hidden = self.references(people, persons, references, crop)
        if self.adapter.config.text_tokens:  # one vector for a face
            combination = "average"
        tokens, bias = combine_references(hidden.flatten(0, 1), [references] * len(persons), combination)
        with cpu_autocast():
            return self.adapter.control(self.adapter.project(tokens), bias)

    @torch.no_grad()
    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Pictures ``(N, 3, S, S)`` in −1…1 through the autoencoder: the most that any drawing can show."""
        return self.frozen.decode(self.frozen.sample_latents(self.frozen.encode_pixels(pictures)))

    @torch.no_grad()
    def draw(
        self,
        people: People | None,
        asked: Sequence[Request],
        guidance: Guidance,
        references: int = 0,
        combination: str = "concat",
        crop: str = "head",
        steps: int = 20,
        batch: int = 32,
        change_clean: Callable[[Tensor], Callable[[Tensor, int], Tensor]] | None = None,
    ) -> Tensor:
        """Pictures ``(N, 3, S, S)`` in −1…1 of some of ``people``.

        With ``references`` 0 they are drawn without a face, under the same guidance, and ``people`` may be None.

        ``crop`` is how the references are cropped: the whole ``head``, or the smaller box of a face ``detector``.
        ``change_clean`` makes of the references ``(B, references, T, E)`` of some pictures what changes their predicted
        clean latents, see :func:`trainer.training.sampling.sample`.
        """
        shape, done = self.frozen.latent_shape(self.size, self.size), []
        for first in range(0, len(asked), batch):
            chunk = asked[first : first + batch]
            persons = [request.person for request in chunk]
            face = self.faces(people, persons, references, combination, crop) if references else None
            change = None
            if change_clean is not None:
                change = change_clean(self.references(people, persons, references, crop))
            text = self.frozen.encode_text([caption(r.scene) for r in chunk])
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in chunk])
            with cpu_autocast():
                with changed_by(self.frozen.host, self._unet if references else None):
                    latents = sample(self.frozen, noise, text, guidance, face, steps=steps, change_clean=change)
            done.append(self.frozen.decode(latents))
        return torch.cat(done)


class Examination:
    """The judges and the people that the examiner knows.

    Args:
        centre: ``(D,)`` mean of the embeddings of the people's pictures.
        gallery: ``(people, D)`` one direction from the centre for each.
        folder: the small model.
    """

    def __init__(self, centre: Tensor, gallery: Tensor, folder: Path = system.FOLDER):
        self.judges = system.load_examiner(folder)
        self.centre, self.gallery = centre.float(), gallery.float()

    @classmethod
    @torch.no_grad()
    def of(cls, people: People, identities: int, folder: Path = system.FOLDER) -> Examination:
        """Knows the pictures after the references of the first ``identities`` people."""
        examiner = system.load_examiner(folder).examiner
        index = people.pictures_of(identities)[:, REFERENCES:]
        known = torch.stack([examiner(people.pixels(person)).identity for person in index])  # (people, pictures, D)
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
    def examine(self, pictures: Tensor, batch: int = 100) -> Readings:
        """What the judges say of pictures ``(N, 3, S, S)`` in −1…1."""
        read = [self.judges.examiner(chunk) for chunk in pictures.split(batch)]
        eyes = None
        if self.judges.eyes is not None:
            logits = torch.cat([self.judges.eyes(chunk) for chunk in pictures.split(batch)])[:, 0]
            eyes = two_eyes(logits.numpy()).astype(float)
        centred = F.normalize(torch.cat([one.identity for one in read]) - self.centre, dim=-1)
        return Readings(
            centred @ self.gallery.T,
            {name: torch.cat([one.attributes[name] for one in read]).argmax(1).numpy() for name in ATTRIBUTES},
            {
                name: torch.cat([one.features[name] for one in read]).argmax(1).numpy()
                for name in self.judges.examiner.values
            },
            torch.cat([one.pooled for one in read]).numpy(),
            eyes,
        )

    def scores(self, read: Readings, asked: Sequence[Request]) -> dict[str, np.ndarray]:
        """For each picture ``top1`` (0 or 1), ``similarity`` (mean-centred cosine to the person) and ``prompt`` (share
        of the scene's attributes read back)."""
        person = torch.tensor([request.person for request in asked])
        followed = [read.attributes[name] == wanted for name, wanted in wanted_attributes(asked).items()]
        return {
            "top1": (read.near.argmax(1) == person).float().numpy(),
            "similarity": read.near[torch.arange(len(person)), person].numpy(),
            "prompt": np.mean(followed, 0),
        }

    @torch.no_grad()
    def drift(self, pictures: Tensor, plain: Tensor) -> np.ndarray:
        """For each picture the mean absolute difference (0…1) from ``plain``, the picture of the frozen model, outside
        the heads of both."""
        outside = 1 - self.heads(torch.cat([pictures, plain])).unflatten(0, (2, len(pictures))).amax(0)
        apart = (pictures - plain).abs().mean(1, keepdim=True) / 2
        return ((apart * outside).sum((1, 2, 3)) / outside.sum((1, 2, 3)).clamp(min=1)).numpy()

    def heads(self, pictures: Tensor) -> Tensor:
        """Masks ``(N, 1, S, S)`` of head and hair as the mask reader sees them, a cell of the small mask wider."""
        read = torch.cat([self.judges.masks(chunk) for chunk in pictures.split(200)]) > 0
        wider = F.max_pool2d(read.float(), 3, 1, 1)
        return F.interpolate(wider, size=pictures.shape[-2:], mode="nearest")

    def compare(self, pictures: Tensor, person: int) -> list[tuple[float, int]]:
        """For each picture its mean-centred cosine to a person, and how many people are nearer (0: it is the
        person)."""
        near = self.examine(pictures).near
        return [(float(row[person]), int((row > row[person]).sum())) for row in near]


def wanted_attributes(asked: Sequence[Request]) -> dict[str, np.ndarray]:
    """For each of ``ATTRIBUTES`` the numbers ``(N,)`` of the values that scenes ask for."""
    return {a: np.array([values.index(r.scene[a]) for r in asked]) for a, values in ATTRIBUTES.items()}


def bootstrap(values: np.ndarray, persons: np.ndarray, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` ``(N,)`` or ``(trainings, N)`` when people, not pictures, are drawn
    again, and with several trainings these too.

    Args:
        persons: ``(N,)`` whom each value is of.
    """
    rng, values = np.random.default_rng(seed), np.atleast_2d(values)
    means = np.stack([values[:, persons == i].mean(1) for i in np.unique(persons)], 1)  # (trainings, people)
    drawn = rng.integers(means.shape[1], size=(rounds, means.shape[1]))
    trained = rng.integers(len(means), size=(rounds, len(means)))
    again = means[trained[:, :, None], drawn[:, None, :]].mean((1, 2))
    low, high = np.percentile(again, [2.5, 97.5])
    return float(low), float(high)
