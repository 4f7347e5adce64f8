"""Drawing the pictures with the trainer's own sampler; those that are there already are not drawn again."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from feedface_core.conditioning import Face, FaceControl
from feedface_core.files.adapter_file import UNET_FILE
from feedface_core.files.atomic import replacing
from feedface_core.files.provenance import mark

from ..config import EvaluateSettings
from ..data import pictures, randomness
from ..errors import TrainerError
from ..models.frozen_model import FrozenModel, load_frozen_model, weights_fingerprint
from ..models.precision import DTYPES
from ..training.sampling import sample
from ..training.validation import make_guidance
from .looking import References
from .measures import FACE, UNMODIFIED
from .memo import Memo, digest_of, key_of
from .people import Request
from .subject import Subject

logger = logging.getLogger(__name__)

STAMP = "feedface_evaluation"
"""The text in a picture that says what it was drawn from."""
FOLDERS = {FACE: "pictures", UNMODIFIED: "unmodified"}
Controls = tuple[FaceControl | None, FaceControl | None]


class Painter:
    """Draws pictures of people, and of the unmodified model.

    Args:
        settings: how.
        subject: the adapter; None draws pictures of the unmodified model only.
        output: where :data:`FOLDERS` are.
        memo: of the output folder; remembers how long the drawing took.

    Attributes:
        seconds: of drawing, for each kind of picture, those of earlier runs included.

    Raises:
        FeedFaceError: the base cannot be loaded, or the adapter was made for another.
    """

    def __init__(self, settings: EvaluateSettings, subject: Subject | None, output: Path, memo: Memo) -> None:
        self.settings, self.subject, self.output, self.memo = settings.sampling, subject, output, memo
        self.precision, self.seconds = settings.model.precision, defaultdict(float)
        self.frozen: FrozenModel = load_frozen_model(settings.model, settings.device)
        self.adapter = self.weights = None
        self.side = self.settings.size or (512 if subject is None else subject.resolution)
        if subject is not None:
            config = subject.config
            if (config.host, config.prediction) != (self.frozen.family, self.frozen.prediction):
                raise TrainerError(
                    f"adapter {subject.name}: is for {config.host} with {config.prediction} prediction, but model.base "
                    f"{settings.model.base} is {self.frozen.family} with {self.frozen.prediction} prediction"
                )
            beside = subject.file.metadata.get(UNET_FILE)
            if beside and settings.model.unet is None:
                logger.warning(
                    "%s was trained together with the U-Net: without model.unet=%s, the file beside it, its "
                    "pictures are those of another model",
                    subject.name,
                    Path(subject.file.path).with_name(beside),
                )
            self.adapter = subject.file.build(torch.float32).to(settings.device)
            self.weights = weights_fingerprint({"adapter": self.adapter})
            try:
                self.frozen.attach(self.adapter)
            except ValueError as error:
                raise TrainerError(f"adapter {subject.name}: does not fit {settings.model.base}: {error}") from error
        self.guidance = make_guidance(self.settings)
        self.shape = self.frozen.latent_shape(self.side, self.side)
        drawn = self.settings.model_dump(exclude={"size", "strength", "combination"})
        self._depends = [self.frozen.fingerprint(), self.precision, self.side, drawn]

    @property
    def strength(self) -> float:
        """Of the branches."""
        return self.subject.config.strength if self.settings.strength is None else self.settings.strength

    def with_face(self, references: References) -> dict[Request, Path]:
        """The pictures of a person that are asked for."""
        combination = self.settings.combination or self.subject.config.combination
        shown = [[digest_of(look.path), look.face.box] for look in references.shown]
        depends = [self.weights, self.strength, combination, shown]
        return self._draw(FACE, references.person.requests, depends, lambda: self._controls(references, combination))

    def unmodified(self, requests: Sequence[Request]) -> dict[Request, Path]:
        """Pictures of the model without the adapter, under the same guidance with the face dropped."""
        return self._draw(UNMODIFIED, requests, None, lambda: (None, None))

    def _controls(self, references: References, combination: str) -> Controls:
        crops = self.subject.crops(references.shown)
        fields = {"device": self.frozen.device, "dtype": torch.float32, "strength": self.strength}
        second = self.adapter.background  # of another photo without its face: dropped here
        background = None if second is None else second.null_control(**fields)
        face = Face(self.subject.encode(crops), combination=combination)
        face = self.adapter.control_of(face, **fields, background=background)
        return face, self.adapter.null_control(**fields)

    @torch.no_grad()
    def _draw(
        self, kind: str, requests: Sequence[Request], face: list | None, controls: Callable[[], Controls]
    ) -> dict[Request, Path]:
        """Draw what is missing. A picture is drawn beside the same others each time: in another batch it would differ
        by rounding."""
        made, faces = {}, None
        for start in range(0, len(requests), self.settings.batch_size):
            chunk = requests[start : start + self.settings.batch_size]
            keys = [key_of(self._depends, face, _noise_key(request)) for request in chunk]
            paths = [self.output / FOLDERS[kind] / f"{request.name}.png" for request in chunk]
            made |= zip(chunk, paths, strict=True)
            missing = [place for place, path in enumerate(paths) if stamp_of(path) != keys[place]]
            took = self.memo.get(key_of("seconds", keys)) or {"seconds": 0.0}
            if missing:
                began, faces = time.monotonic(), faces or controls()
                drawn = self._sample(chunk, *faces)
                for place in missing:
                    write_picture(drawn[place], paths[place], keys[place])
                took = self.memo.put(key_of("seconds", keys), seconds=round(time.monotonic() - began, 3))
            self.seconds[kind] += took["seconds"]
        return made

    def _sample(self, chunk: Sequence[Request], face: FaceControl | None, dropped: FaceControl | None) -> Tensor:
        """``(B, 3, H, W)`` in −1…1."""
        frozen, precision = self.frozen, DTYPES[self.precision]
        noise = torch.stack([randomness.normal(self.shape, *_noise_key(request)) for request in chunk])
        with torch.autocast(frozen.device.type, precision, enabled=precision != torch.float32):
            text = frozen.encode_text([request.prompt for request in chunk])
            latents = sample(frozen, noise, text, self.guidance, face, dropped, self.settings.steps)
            return frozen.decode(latents).float().cpu()


def _noise_key(request: Request) -> tuple[int | str, ...]:
    """The same with and without the face, so that their difference is the face alone."""
    return "evaluation", request.person, request.prompt, request.seed, request.round


def stamp_of(path: Path) -> str | None:
    """What a picture says it was drawn from; None if it is missing, broken, or says nothing."""
    try:
        with pictures.open_picture(path) as file:
            file.load()
            return file.info.get(STAMP)
    except (OSError, ValueError, SyntaxError):
        return None


def write_picture(pixels: Tensor, path: Path, stamp: str) -> None:
    """``(3, H, W)`` in −1…1 as PNG, marked as generated, in one piece. Raises ``TrainerError`` if it cannot be
    written."""
    from PIL.PngImagePlugin import PngInfo

    told, file = PngInfo(), BytesIO()
    told.add_text(STAMP, stamp)
    pictures.to_picture((pixels.movedim(0, -1) + 1.0) / 2.0).save(file, format="PNG", pnginfo=told)
    try:
        with replacing(path) as partial:
            partial.write_bytes(mark(file.getvalue()))
    except OSError as error:
        why = error.strerror or error
        raise TrainerError(f"{path}: cannot be written: {why}; run the same command again, it goes on here") from error
