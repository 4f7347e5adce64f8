"""Pictures during training: fixed prompts, seeds and references, with and without the face, as one grid."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from feedface_core.conditioning import Face
from feedface_core.config import EncoderConfig

from ..data import randomness
from ..data.dataset import FaceDataset, read_crop
from ..models.frozen_model import Text
from .build import Parts, SetupError
from .sampling import make_guidance, sample

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..config import Config

logger = logging.getLogger(__name__)

SAMPLE_PEOPLE = 2
MARGIN, LINE = 4, 16


class ValidationStopped(Exception):
    """The pictures were broken off, because the run was asked to stop."""


@dataclass(frozen=True)
class Person:
    """Whose face the pictures show: crops ``(N, S, S, 3)`` in 0…1 and their hidden states ``(N, T, E)``."""

    crops: Tensor
    hidden: Tensor


class Validation:
    """Makes the pictures of ``validation`` and writes them to ``<output>/validation/step-<n>.png``.

    Everything the encoders have to do is done here, before training starts, so they may be released after.

    Args:
        config: ``validation``, ``data.resolution`` and ``train.output`` are read.
        parts: base, encoder and adapter.
        dataset: its first photos are the references when the settings name none.
        accelerator: its trackers get the grid as well.
        interrupted: asked before each denoising step; True ends the pictures with :class:`ValidationStopped`.

    Raises:
        SetupError: for a reference photo that cannot be read or shows no face.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        dataset: FaceDataset,
        accelerator: Accelerator,
        interrupted: Callable[[], bool] = lambda: False,
    ):
        self.settings, self.interrupted = config.validation, interrupted
        self.parts, self.accelerator = parts, accelerator
        self.folder = Path(config.train.output) / "validation"
        self.combination = {"average": "average"}.get(config.adapter.combination, "concat")
        size = self.settings.size or config.data.resolution
        self.shape = (1, *parts.base.latent_shape(size, size))
        self.guidance = make_guidance(self.settings)
        self.people = self._people(dataset, config.adapter.encoder.image_size)
        self.texts: list[Text] = [parts.base.encode_text([prompt]) for prompt in self.settings.prompts]
        parts.base.null_text()

    def _people(self, dataset: FaceDataset, size: int) -> list[Person]:
        if self.settings.references:
            encoder = self.parts.adapter.config.encoder
            crops = [torch.stack([_crop_of(path, encoder) for path in self.settings.references])]
        else:
            crops = [read_crop(record, size).unsqueeze(0) for record in dataset.records[:SAMPLE_PEOPLE]]
        return [Person(own, self.parts.encoder.encode(own).float()) for own in crops]

    def _pictures(self, person: Person, seed: int, text: Text) -> list[Tensor]:
        """Without and with the face, each ``(3, H, W)`` in −1…1."""
        base, adapter = self.parts.base, self.parts.adapter
        fields = {"device": base.device, "dtype": torch.float32, "strength": self.settings.strength}
        face = adapter.control_of(Face(person.hidden, combination=self.combination), **fields)
        dropped = adapter.null_control(**fields)
        noise, steps = randomness.normal(self.shape, seed, "validation"), self.settings.steps
        latents = [
            sample(base, noise, text, self.guidance, shown, dropped, steps, self._go_on) for shown in (None, face)
        ]
        return [base.decode(own)[0].cpu() for own in latents]

    def _go_on(self) -> None:
        if self.interrupted():
            raise ValidationStopped

    @torch.no_grad()
    def __call__(self, step: int) -> Path:
        """Make the grid of a step: a line for each person and seed; the references, then for each prompt the
        picture without and with the face. Returns its file."""
        lines = []
        with self.accelerator.autocast():
            for person in self.people:
                for seed in self.settings.seeds:
                    tiles = [picture for text in self.texts for picture in self._pictures(person, seed, text)]
                    lines.append((person, tiles))
        captions = [
            caption for prompt in self.settings.prompts for caption in (f"no face: {prompt}", f"face: {prompt}")
        ]
        grid = draw_grid(lines, ["references", *captions])
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.png"
        grid.save(path)
        for tracker in self.accelerator.trackers:
            _log_picture(tracker, grid, step)
        logger.info("wrote %s", path)
        return path


def _crop_of(path: str, encoder: EncoderConfig) -> Tensor:
    """The largest face of a photo as a crop ``(S, S, 3)``, cut as in training; the whole photo where no
    detector finds one.
    """
    from feedface_core.faces import FaceError, crop_face, load_detector, load_image, select_from_photo
    from feedface_core.faces.select import crop_scale_of

    try:
        photo = load_image(path)
        chosen = select_from_photo(photo, load_detector(), when_none="whole image", name=path).chosen_faces[0]
        scale = crop_scale_of(chosen, encoder.crop_scale)
        return crop_face(photo, chosen.box, encoder.image_size, scale, encoder.crop_fill, encoder.crop_border)
    except (FaceError, OSError, ValueError) as error:
        raise SetupError(f"validation.references: {path}: {error}") from error


def draw_grid(lines: list[tuple[Person, list[Tensor]]], captions: list[str]) -> Image.Image:
    """Pictures in lines under their captions.

    Args:
        lines: a person and the pictures of the line, each ``(3, H, W)`` in −1…1.
        captions: of the columns, the references' first.
    """
    side = lines[0][1][0].shape[-1]
    height = lines[0][1][0].shape[-2]
    columns = len(captions)
    cell, row = side + MARGIN, height + MARGIN
    grid = Image.new("RGB", (columns * cell + MARGIN, len(lines) * row + MARGIN + LINE), "white")
    pen = ImageDraw.Draw(grid)
    for column, caption in enumerate(captions):
        shown = caption.encode("latin-1", "replace").decode("latin-1")[: max(side // 6, 1)]
        pen.text((MARGIN + column * cell, 2), shown, fill="black")
    for number, (person, pictures) in enumerate(lines):
        top = LINE + MARGIN + number * row
        for place, crop in enumerate(person.crops):  # side by side in one cell
            width = side // len(person.crops)
            tile = _to_image(crop.movedim(-1, 0) * 2.0 - 1.0).resize((width, width))
            grid.paste(tile, (MARGIN + place * width, top))
        for column, picture in enumerate(pictures, 1):
            grid.paste(_to_image(picture), (MARGIN + column * cell, top))
    return grid


def _to_image(picture: Tensor) -> Image.Image:
    values = ((picture.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.movedim(0, -1).cpu().numpy())


def _log_picture(tracker: Any, grid: Image.Image, step: int) -> None:
    import numpy

    if tracker.name == "tensorboard":
        tracker.log_images({"validation": numpy.asarray(grid)[None]}, step=step, dataformats="NHWC")
    else:
        tracker.log_images({"validation": [grid]}, step=step)
