"""The node that pulls the picture towards a face while it is sampled (identity guidance).

Every so many steps the predicted clean picture is decoded where the face is, the adapter's face encoder looks at the
face, and the prediction takes a step up the gradient of its likeness to the references. It works on any model, with and
without an adapter's branches, behind whatever guidance combined the predictions.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor, nn
from torch.func import functional_call

from ..feedface_core.conditioning import Face
from ..feedface_core.errors import FeedFaceError, shorten
from ..feedface_core.faces import (
    AUTO,
    Box,
    Detector,
    clamp_square,
    cut_squares,
    faces_from_json,
    load_detector,
    square_box,
)
from ..feedface_core.modules.likeness import EncoderLikeness, mean_vectors, pull
from .adapter import LoadedAdapter
from .checks import checked
from .encode import single_person
from .folders import model_folders
from .model_patch import Shared
from .types import Adapter, FaceSocket, make_schema

MARGIN = 4
"""Cells that are decoded around the face, since a decoder looks around: latent pixels."""


class WithGradient(nn.Module):
    """A module that can be differentiated by its input although its weights were made in inference mode, as those of
    all models that nodes load are: autograd keeps no such tensor, so each call has copies of them."""

    def __init__(self, module: nn.Module, method: str = "forward") -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.method)(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The module's method with a gradient."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        copies = {name: tensor.clone() for name, tensor in tensors.items() if tensor.is_inference()}
        return functional_call(self, copies, args, kwargs)


class EncoderWithGradient:
    """What :class:`EncoderLikeness` needs of an encoder."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters, self._wrapped = module.parameters, WithGradient(module)

    def __call__(self, **kwargs: Any) -> Any:
        return self._wrapped.call(**kwargs)


@dataclass(eq=False)
class IdentityGuidance(Shared):
    """A function behind the guidance: the predicted clean latents, pulled towards a face.

    Args:
        adapter: whose face encoder recognises.
        face: towards whom.
        vae: decodes.
        place: where the face is, in pixels of the picture; or who finds it in the predicted picture.
        scale: how far a step goes: the mean change of the face's latents, in their standard deviation.
        start, end: share of the run, 0…1, between which it acts.
        every: steps from one pull to the next.
        warned: whether it was said that there is no face.
    """

    adapter: LoadedAdapter
    face: Face
    vae: VAE
    place: Box | Detector
    scale: float
    start: float
    end: float
    every: int
    warned: bool = False

    def __call__(self, args: dict[str, Any]) -> Tensor:
        """ComfyUI's post-CFG function."""
        clean, model = args["denoised"], args["model"]
        if not self.acts_at(model.model_sampling, args["sigma"], args["model_options"]):
            return clean
        if clean.ndim != 4:
            raise FeedFaceError(
                f"FeedFace Identity Guidance: the model's latents are {tuple(clean.shape)}, expected pictures "
                "(B, C, h, w); videos have no such guidance"
            )
        moved = clean.clone()
        for row, box in enumerate(self.boxes(clean, model)):
            if box is not None:
                moved[row : row + 1] = self.pulled(clean[row : row + 1], model, box)
        return moved

    def acts_at(self, sampling: Any, sigma: Tensor, options: dict[str, Any]) -> bool:
        """Whether a step is one of those that pull."""
        level = float(sigma.flatten()[0])
        first, last = (float(sampling.percent_to_sigma(share)) for share in (self.start, self.end))
        if not last <= level <= first:
            return False
        levels = options.get("transformer_options", {}).get("sample_sigmas")
        return levels is None or int((levels > level * (1 + 1e-5)).sum()) % self.every == 0

    def boxes(self, clean: Tensor, model: Any) -> list[Box | None]:
        """Where the face is in each picture of a batch, in pixels."""
        if not isinstance(self.place, Detector):
            return [self.place] * len(clean)
        found: list[Box | None] = []
        with torch.no_grad():
            pictures = [self.decode(row, model)[0].movedim(0, -1).clamp(0, 1).cpu() for row in clean.split(1)]
        for picture in pictures:
            faces = sorted(self.place.detect(picture.float()), key=lambda one: -one.size)
            found.append(faces[0].box if faces else None)
        if not any(found) and not self.warned:
            self.warned = True
            logging.warning("[FeedFace] Identity Guidance: no face in the picture yet; give boxes, or a later start")
        return found

    def decode(self, clean: Tensor, model: Any) -> Tensor:
        """Latents ``(1, C, h, w)`` → pictures ``(1, 3, H, W)`` in 0…1, with a gradient."""
        vae, latents = self.vae, model.process_latent_out(clean)
        decoded = WithGradient(vae.first_stage_model, "decode").call(latents.to(vae.device, vae.vae_dtype))
        return vae.process_output(decoded.float()).to(clean.device)

    def pulled(self, clean: Tensor, model: Any, box: Box) -> Tensor:
        """Latents ``(1, C, h, w)`` of one picture after a step towards the face at a box."""
        encoder, cell = self.adapter.config.encoder, int(self.vae.spacial_compression_decode())
        height, width = clean.shape[-2:]
        square = square_box(box, encoder.crop_scale)
        if encoder.crop_border == "clamp":
            square = clamp_square(square, width * cell, height * cell)
        window = window_of(square, height, width, cell)
        top, bottom, left, right = window
        inside = (square[0] - left * cell, square[1] - top * cell, square[2] - left * cell, square[3] - top * cell)
        patcher = self.adapter.encoder_patcher()
        likeness = EncoderLikeness(EncoderWithGradient(patcher.model["model"]), encoder)
        vectors = likeness.of_hidden(self.face.hidden.to(clean.device))
        reference = mean_vectors(vectors, [len(vectors)], self.face.weights)

        def crops_of(latents: Tensor) -> Tensor:
            return cut_squares(self.decode(latents, model), [inside], encoder.image_size, encoder.crop_fill)

        cells = clean.shape[1] * (square[2] - square[0]) * (square[3] - square[1]) / cell**2
        part, moved = clean[:, :, top:bottom, left:right], clean.clone()
        moved[:, :, top:bottom, left:right], _ = pull(
            part, crops_of, likeness, reference, [self.scale * math.sqrt(cells)]
        )
        return moved


def window_of(square: Box, height: int, width: int, cell: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right, in cells of latents (height, width), of what is decoded for a square in pixels."""
    left, top = (max(math.floor(value / cell) - MARGIN, 0) for value in square[:2])
    right, bottom = (math.ceil(value / cell) + MARGIN for value in square[2:])
    return min(top, height - 1), max(min(bottom, height), 1), min(left, width - 1), max(min(right, width), 1)


def place_of(boxes: str) -> Box | Detector:
    """The one box of a text; a detector for an empty text.

    Raises:
        FeedFaceError: not one box, or no detector.
    """
    if not boxes.strip():
        return load_detector(AUTO, insightface_roots=model_folders("insightface"))
    faces = faces_from_json(boxes, 1)[0]
    if len(faces) != 1:
        raise FeedFaceError(f"boxes: there are {len(faces)}, expected the one of the face, such as [40, 30, 120, 130]")
    return faces[0].box


class IdentityGuidanceNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceIdentityGuidance",
            inputs=[
                io.Model.Input("model"),
                Adapter.Input("adapter"),
                FaceSocket.Input("face"),
                io.Vae.Input("vae"),
                io.Float.Input("scale", default=0.05, min=0.0, max=10.0, step=0.01),
                io.Float.Input("start", default=0.3, min=0.0, max=1.0, step=0.01),
                io.Float.Input("end", default=0.9, min=0.0, max=1.0, step=0.01),
                io.Int.Input("every", default=2, min=1, max=1000),
                io.String.Input("boxes", default="", optional=True, placeholder="[[200, 80, 320, 230]] in pixels"),
            ],
            outputs=[io.Model.Output()],
            search_aliases=["identity guidance", "face guidance", "likeness", "identity loss", "universal guidance"],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: ModelPatcher,
        adapter: LoadedAdapter,
        face: Face,
        vae: VAE,
        scale: float,
        start: float,
        end: float,
        every: int,
        boxes: str = "",
    ) -> io.NodeOutput:
        if not isinstance(vae, VAE):
            raise FeedFaceError(f"vae is {shorten(vae)}, expected what an output VAE gives")
        if start > end:
            raise FeedFaceError(f"start {start} lies after end {end}; the face would never act")
        single_person(face)
        adapter.check_face(face)
        if scale == 0.0 or face.empty:
            return io.NodeOutput(model)
        guidance = IdentityGuidance(adapter, face, vae, place_of(boxes), scale, start, end, every)
        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(guidance)
        key = f"feedface_identity_{len(patched.additional_models)}"
        patched.set_additional_models(key, [vae.patcher, adapter.encoder_patcher()])
        return io.NodeOutput(patched)


NODES = [IdentityGuidanceNode]
