"""Pictures during training: fixed prompts, seeds and references, with and without the face, as one grid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import make_grid

from feedface_core import guidance
from feedface_core.conditioning import Face, People
from feedface_core.config import EncoderConfig
from feedface_core.faces import Box
from feedface_core.faces.regions import BOX_SCALE, region_masks

from ..config import Config, SamplingSettings
from ..data import randomness
from ..data.dataset import FaceDataset
from ..data.reading import read_background, read_crop
from ..errors import TrainerError
from ..models.adapter import Models
from ..models.frozen_model import Text
from .sampling import sample
from .stopping import Interrupted

logger = logging.getLogger(__name__)

SAMPLE_PEOPLE = 2
MARGIN, LINE = 4, 16


@dataclass(frozen=True)
class Person:
    """Whose face the pictures show: crops ``(N, S, S, 3)`` in 0…1 and their hidden states ``(N, T, E)``, and those of a
    photo without its face ``(1, T, E)`` for an adapter with a second stream.

    Several people have one crop each, and ``boxes`` says where each face is in a picture of side 1.
    """

    crops: Tensor
    hidden: Tensor
    background: Tensor | None = None
    boxes: tuple[Box, ...] | None = None


def make_guidance(settings: SamplingSettings) -> guidance.Guidance:
    """The guidance that the settings name; the scales mean what they mean in the node FeedFace Guider."""
    return guidance.by_name(settings.guidance, settings.text_scale, settings.face_scale, settings.both_scale)


class Validation:
    """Makes the pictures of ``validation`` and writes them to ``<output>/validation/step-<n>.png``.

    Everything the encoders have to do is done here, before training starts, so they may be released after.

    Args:
        config: ``validation``, ``data.resolution`` and ``train.output`` are read.
        models: of the run.
        dataset: its first photos are the references when the settings name none.
        accelerator: its trackers get the grid as well.
        interrupted: asked before each denoising step; True ends the pictures with :class:`Interrupted`.

    Raises:
        TrainerError: for a reference photo that cannot be read or shows no face.
    """

    def __init__(
        self,
        config: Config,
        models: Models,
        dataset: FaceDataset,
        accelerator: Accelerator,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings, self.models, self.accelerator = config.validation, models, accelerator
        self.interrupted, self.combination = interrupted, config.adapter.combination
        self.folder = Path(config.train.output) / "validation"
        size = self.settings.size or config.data.resolution
        self.shape = (1, *models.frozen.latent_shape(size, size))
        self.cells = (size // models.frozen.cell,) * 2
        self.guidance = make_guidance(self.settings)
        if self.settings.references:
            encoder = models.adapter.config.encoder
            faces = [(torch.stack([_crop_of(path, encoder) for path in self.settings.references]), None)]
        else:
            side = config.adapter.encoder.image_size
            photos = (index for index in range(len(dataset)) if dataset.records[index].face_number == 0)
            shown = list(islice(photos, SAMPLE_PEOPLE))
            faces = [_faces_of(dataset, index, side) for index in shown]
        backgrounds: list[Tensor | None] = [None] * len(faces)
        if models.adapter.background is not None and not self.settings.references:
            pictures = [read_background(dataset.records[index], side, config.data.crop) for index in shown]
            backgrounds = [models.encoder.encode(picture[None]).float() for picture in pictures]
        self.people = [
            Person(own, models.encoder.encode(own).float(), background, boxes)
            for (own, boxes), background in zip(faces, backgrounds, strict=True)
        ]
        self.texts: list[Text] = [models.frozen.encode_text([prompt]) for prompt in self.settings.prompts]
        models.frozen.null_text()

    def _pictures(self, person: Person, seed: int, text: Text) -> list[Tensor]:
        """Without and with the face, each ``(3, H, W)`` in −1…1."""
        frozen, adapter, settings = self.models.frozen, self.models.adapter, self.settings
        fields = {"device": frozen.device, "dtype": torch.float32, "strength": settings.strength}
        background = None
        if adapter.background is not None:
            background = adapter.background.null_control(**fields)
            if person.background is not None:
                background = adapter.background.control_of(Face(person.background), **fields)
        face = adapter.control_of(self._face(person), **fields, background=background)
        face = replace(face, **face.at_latents(torch.empty(1, 1, *self.cells)))
        dropped = adapter.null_control(**fields)
        noise = randomness.normal(self.shape, seed, "validation")
        latents = [
            sample(frozen, noise, text, self.guidance, shown, dropped, settings.steps, self._go_on)
            for shown in (None, face)
        ]
        return [frozen.decode(own)[0].float().cpu() for own in latents]

    def _face(self, person: Person) -> Face | People:
        if person.boxes is None:
            return Face(person.hidden, combination=self.combination)
        height, width = (cells * self.models.frozen.cell for cells in self.cells)
        boxes = [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in person.boxes]
        faces = tuple(Face(own, combination=self.combination) for own in person.hidden.split(1))
        return People(faces, region_masks(boxes, BOX_SCALE, height, width))

    def _go_on(self) -> None:
        if self.interrupted():
            raise Interrupted

    @torch.no_grad()
    def __call__(self, step: int) -> Path:
        """Make the grid of a step: a line for each person and seed; the references, then for each prompt the picture
        without and with the face. Returns its file."""
        with self.accelerator.autocast():
            lines = [
                (person.crops, [picture for text in self.texts for picture in self._pictures(person, seed, text)])
                for person in self.people
                for seed in self.settings.seeds
            ]
        captions = [f"{what}: {prompt}" for prompt in self.settings.prompts for what in ("no face", "face")]
        grid = draw_grid(lines, ["references", *captions])
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.png"
        grid.save(path)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": numpy.asarray(grid)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"validation": [grid]}, step=step)
        logger.info("wrote %s", path)
        return path


def _faces_of(dataset: FaceDataset, index: int, side: int) -> tuple[Tensor, tuple[Box, ...] | None]:
    """The crops ``(N, side, side, 3)`` of the people in a sample's picture, and where they are if these are several."""
    shown, places = dataset.shown(index, flip=False)
    crops = torch.stack([read_crop(dataset.records[face], side) for face in shown])
    if len(shown) == 1:
        return crops, None
    size = dataset.size_of(index) * 2
    return crops, tuple(tuple(one / side for one, side in zip(place.box, size, strict=True)) for place in places)


def _crop_of(path: str, encoder: EncoderConfig) -> Tensor:
    """The largest face of a photo as a crop ``(S, S, 3)``, cut as in training; the whole photo where no detector finds
    one."""
    from feedface_core.faces import crop_face, load_detector, load_image, select_from_photo
    from feedface_core.faces.select import crop_scale_of

    try:
        photo = load_image(path)
        chosen = select_from_photo(photo, load_detector(), when_none="whole image", name=path).chosen_faces[0]
        scale = crop_scale_of(chosen, encoder.crop_scale)
        return crop_face(photo, chosen.box, encoder.image_size, scale, encoder.crop_fill, encoder.crop_border)
    except (OSError, ValueError) as error:
        raise TrainerError(f"validation.references: {path}: {error}") from error


def draw_grid(lines: Sequence[tuple[Tensor, list[Tensor]]], captions: Sequence[str]) -> Image.Image:
    """Pictures in lines under their captions.

    Args:
        lines: the references ``(N, S, S, 3)`` in 0…1 and the pictures of each line, each ``(3, H, W)`` in −1…1.
        captions: of the columns, the references' first.
    """
    tiles = []
    for crops, pictures in lines:
        width = pictures[0].shape[-1] // len(crops)
        small = resize(crops.movedim(-1, 1).float().cpu(), [width, width], antialias=True)  # (N, 3, width, width)
        tile = torch.ones_like(pictures[0])
        tile[:, :width, : width * len(crops)] = torch.cat([*small], dim=-1)  # side by side
        tiles += [tile, *((picture + 1.0) / 2.0 for picture in pictures)]
    grid = make_grid(torch.stack(tiles), nrow=len(captions), padding=MARGIN, pad_value=1.0).clamp(0.0, 1.0)
    drawn = Image.new("RGB", (grid.shape[2], grid.shape[1] + LINE), "white")
    drawn.paste(to_pil_image(grid), (0, LINE))
    pen, side = ImageDraw.Draw(drawn), tiles[0].shape[-1]
    for column, caption in enumerate(captions):
        shown = caption.encode("latin-1", "replace").decode("latin-1")[: max(side // 6, 1)]
        pen.text((MARGIN + column * (side + MARGIN), 2), shown, fill="black")
    return drawn
