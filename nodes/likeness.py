"""Nodes that say how alike pictures are to a person, and keep the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..feedface_core.errors import FeedFaceError, shorten
from ..feedface_core.faces import AUTO, DETECTOR_NAMES, DetectedFace, Detector, crop_face, crop_scale_of, load_detector
from ..feedface_core.faces.likeness import Likeness, best_of, check_count, describe, known_vectors, likeness
from ..feedface_core.faces.recognisers import RECOGNISER_NAMES, EncoderRecogniser, Recogniser, load_recogniser
from .adapter import LoadedAdapter
from .checks import checked
from .folders import model_folders
from .types import Adapter, make_schema

ERROR, NOTHING = "error", "nothing"
#: What ComfyUI says when something is connected to the output.
NO_LATENTS = "FeedFace Best Of: kept_latents is connected, but no latents come in; connect those of the pictures"


def recogniser_of(name: str, adapter: LoadedAdapter | None) -> Recogniser:
    """A recogniser by name; the adapter's encoder crops faces as the adapter was trained."""
    encoder = None
    if adapter is not None:
        config = adapter.config.encoder

        def encode(image: Tensor, faces: Sequence[DetectedFace]) -> Tensor:
            how = (config.crop_fill, config.crop_border)
            crops = [
                crop_face(image, face.box, config.image_size, crop_scale_of(face, config.crop_scale), *how)
                for face in faces
            ]
            return adapter.encode(torch.stack(crops))

        encoder = EncoderRecogniser(encode, adapter.encoder_fingerprint)
    return load_recogniser(name, insightface_roots=model_folders("insightface"), encoder=encoder)


def judge(
    image: Tensor, references: Tensor, recogniser: str, detector: str, adapter: LoadedAdapter | None
) -> tuple[list[Likeness], str]:
    """What a recogniser says of every picture ``(B, H, W, 3)``, and the report."""
    judge, finder = recogniser_of(recogniser, adapter), _detector(detector)
    known, without = known_vectors(list(references), finder, judge)
    found, progress = [], comfy.utils.ProgressBar(len(image))
    for picture in image:
        comfy.model_management.throw_exception_if_processing_interrupted()
        found.append(likeness(picture, known, finder, judge))
        progress.update(1)
    return found, describe(found, finder, judge, len(known), without)


def _detector(name: str) -> Detector:
    return load_detector(name, insightface_roots=model_folders("insightface"))


def _inputs() -> list:
    return [
        io.Image.Input("image"),
        io.Image.Input("references"),
        io.Combo.Input("recogniser", options=[AUTO, *RECOGNISER_NAMES], default=AUTO),
        io.Combo.Input("detector", options=[AUTO, *DETECTOR_NAMES], default=AUTO),
    ]


class Score(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceScore",
            inputs=[*_inputs(), Adapter.Input("adapter", optional=True)],
            outputs=[io.Float.Output(is_output_list=True), io.String.Output()],
            search_aliases=["face similarity", "likeness", "face distance", "identity score", "face recognition"],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls,
        image: Tensor,
        references: Tensor,
        recogniser: str = AUTO,
        detector: str = AUTO,
        adapter: LoadedAdapter | None = None,
    ) -> io.NodeOutput:
        found, report = judge(image, references, recogniser, detector, adapter)
        return io.NodeOutput([one.score for one in found], report, ui=ui.PreviewText(report))


class BestOf(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceBestOf",
            inputs=[
                *_inputs(),
                io.Int.Input("count", default=1, min=1, max=4096),
                io.Float.Input("minimum", default=-1.0, min=-1.0, max=1.0, step=0.01),
                io.Combo.Input("when_none", options=[ERROR, NOTHING], default=ERROR),
                io.Latent.Input("latents", optional=True),
                Adapter.Input("adapter", optional=True),
            ],
            outputs=[
                io.Image.Output("images"),
                io.Float.Output("scores", is_output_list=True),
                io.Int.Output("indexes", is_output_list=True),
                io.Latent.Output("kept_latents"),
                io.String.Output("report"),
            ],
            search_aliases=["best of n", "rank by likeness", "sort by face", "likeness", "filter by face", "pick best"],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls,
        image: Tensor,
        references: Tensor,
        recogniser: str = AUTO,
        detector: str = AUTO,
        count: int = 1,
        minimum: float = -1.0,
        when_none: str = ERROR,
        latents: dict | None = None,
        adapter: LoadedAdapter | None = None,
    ) -> io.NodeOutput:
        from comfy_execution.graph import ExecutionBlocker  # not above: it takes its time, and is seldom needed

        if latents is not None:
            check_count(len(image), len(_samples(latents)), "latents")
        found, report = judge(image, references, recogniser, detector, adapter)
        scores = [one.score for one in found]
        chosen = best_of(scores, count, minimum)
        if not chosen:
            text = f"none of {len(scores)} pictures reaches the minimum of {minimum:g}; the best has {max(scores):.3f}"
            if when_none == ERROR:
                raise FeedFaceError(f"{text}. Draw more pictures, lower minimum, or set when_none to {NOTHING}")
            stop, report = ExecutionBlocker(None), f"{report}\nkept: nothing; {text}"
            return io.NodeOutput(stop, stop, stop, stop, report, ui=ui.PreviewText(report))
        report += f"\nkept: {', '.join(f'picture {place + 1} ({scores[place]:.3f})' for place in chosen)}"
        kept = ExecutionBlocker(NO_LATENTS) if latents is None else rows_of(latents, chosen)
        best = [scores[place] for place in chosen]
        return io.NodeOutput(image[chosen], best, chosen, kept, report, ui=ui.PreviewText(report))


def _samples(latents: Any) -> Tensor:
    samples = latents.get("samples") if isinstance(latents, dict) else None
    if not isinstance(samples, Tensor) or samples.ndim < 4:
        raise FeedFaceError(f"latents is {shorten(latents)}, expected what an output LATENT gives")
    return samples


def rows_of(latents: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a LATENT in another order, with their noise masks, and the numbers that their noise comes from."""
    samples, mask = _samples(latents), latents.get("noise_mask")
    kept = {**latents, "samples": samples[list(rows)]}
    if isinstance(mask, Tensor) and len(mask) == len(samples):
        kept["noise_mask"] = mask[list(rows)]
    numbers = latents.get("batch_index", range(len(samples)))
    kept["batch_index"] = [numbers[row] for row in rows]
    return kept


NODES = [Score, BestOf]
