"""The stage that writes captions, and the two that run the model for it: transformers, and vLLM on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from feedface_core.errors import shorten

from ..config.preparation import CaptionSettings, PrepareSettings
from ..errors import TrainerError
from .photo import Batch

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
DEFAULT_PROMPT = "Describe this photo in one sentence."


class Caption:
    """Fills ``row["caption"]`` of photos without a caption of their own; ``row["captioned_by"]`` names the model.

    A photo that the model cannot take gets no caption, and ``detail`` says why; the others of its batch get theirs.

    Args:
        settings: ``model`` is a folder with a transformers image-to-text model (BLIP, GIT, LLaVA, …); ``backend`` is
            what :func:`choose_backend` chose.

    Raises:
        TrainerError: a folder that is missing or holds no such model.
    """

    def __init__(self, settings: CaptionSettings) -> None:
        self.settings, self.model, self.works = settings, None, False
        if settings.model is not None:
            self.model = (VLLM if settings.backend == "vllm" else Transformers)(settings)

    def __call__(self, batch: Batch) -> Batch:
        todo = [photo for photo in batch if photo.kept and not photo.given.get("caption")]
        if todo and self.model is not None:
            self._fill(todo)
        return batch

    def _fill(self, photos: Batch) -> None:
        try:
            texts = self.model.describe([photo.picture for photo in photos])
        except TrainerError:  # a ValueError too, and of no photo
            raise
        except self.model.refusals as error:
            if len(photos) > 1:  # one of them may be the cause
                for photo in photos:
                    self._fill([photo])
                return
            self._check()
            photos[0].row["caption"], photos[0].detail = "", f"caption.model refuses it: {shorten(str(error))}"
            return
        for photo, text in zip(photos, texts, strict=True):
            photo.row |= {"caption": " ".join(text.split()), "captioned_by": Path(self.settings.model).name}

    def _check(self) -> None:
        """Raises :class:`TrainerError` if it is not the photo: the model refuses a plain picture too."""
        from PIL import Image

        if not self.works:
            try:
                self.model.describe([Image.new("RGB", (336, 336), "grey")])
            except self.model.refusals as error:
                why = shorten(str(error))
                raise TrainerError(
                    f"caption.model {self.settings.model}: refuses a plain grey picture too ({why}); look at "
                    "caption.prompt, which without a chat template has to name the picture's place, and at "
                    "caption.max_model_len"
                ) from error
            self.works = True


class Transformers:
    """A model of transformers on ``caption.device``.

    Raises:
        TrainerError: a folder that is missing or holds no image-to-text model.
    """

    refusals: tuple[type[Exception], ...] = (ValueError,)
    """What is raised for a picture that the model cannot take."""

    def __init__(self, settings: CaptionSettings) -> None:
        from transformers import AutoModelForImageTextToText

        self.settings, folder = settings, model_folder(settings)
        try:
            self.processor = load_processor(folder)
            self.model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise no_model(folder, error) from error
        self.model = self.model.eval().to(settings.device)

    @torch.no_grad()
    def describe(self, pictures: Sequence[Image]) -> list[str]:
        """A text for each picture, as the model wrote it."""
        prompt = make_prompt(self.processor, self.settings.prompt)
        text = {} if prompt is None else {"text": [prompt] * len(pictures), "padding": True}
        inputs = self.processor(images=list(pictures), return_tensors="pt", **text).to(self.settings.device)
        ids = self.model.generate(**inputs, max_new_tokens=self.settings.most_tokens, do_sample=False)
        given = inputs.get("input_ids")
        # Decoder-only models repeat what they were given.
        if given is not None and ids.shape[1] > given.shape[1] and torch.equal(ids[:, : given.shape[1]], given):
            ids = ids[:, given.shape[1] :]
        return self.processor.batch_decode(ids, skip_special_tokens=True)


class VLLM:
    """The same by an engine of vLLM (0.11.1 or later) on the process's first GPU: same prompt, greedy, same limit.

    The engine is made with the first batch. It takes its share of the GPU for good, and the process that hands out the
    work makes the stages too, to see that they can be made.

    Raises:
        TrainerError: a folder that is missing or holds no image-to-text model.
    """

    def __init__(self, settings: CaptionSettings) -> None:
        self.settings, self.folder, self.engine = settings, model_folder(settings), None
        try:
            self.prompt = make_prompt(load_processor(self.folder), settings.prompt) or ""
            self.penalty = generation_config(self.folder).repetition_penalty or 1.0
        except (OSError, ValueError, KeyError) as error:
            raise no_model(self.folder, error) from error

    @property
    def refusals(self) -> tuple[type[Exception], ...]:
        """What is raised for a picture that the model cannot take; vLLM then forgets the others of that call."""
        try:
            from vllm.exceptions import VLLMClientError
        except ImportError:  # of before it was told apart
            return (ValueError,)
        return ValueError, VLLMClientError

    def describe(self, pictures: Sequence[Image]) -> list[str]:
        """A text for each picture, as the model wrote it.

        Raises:
            TrainerError: the engine does not start.
        """
        from vllm import SamplingParams

        if self.engine is None:
            self.engine = self._start()
        decoding = SamplingParams(
            temperature=0.0, max_tokens=self.settings.most_tokens, repetition_penalty=self.penalty
        )
        prompts = [{"prompt": self.prompt, "multi_modal_data": {"image": picture}} for picture in pictures]
        # In the order of the prompts, whichever was done first.
        return [found.outputs[0].text for found in self.engine.generate(prompts, decoding, use_tqdm=False)]

    def _start(self) -> Any:
        from vllm import LLM

        try:
            return LLM(
                model=str(self.folder),
                dtype="auto",
                gpu_memory_utilization=self.settings.gpu_memory_utilization,
                max_model_len=self.settings.max_model_len,
                limit_mm_per_prompt={"image": 1},
            )
        except Exception as error:  # RuntimeError of its own process, ValueError, pydantic's, torch's
            raise TrainerError(
                f"caption.backend=vllm: no engine for {self.folder} ({str(error)[-500:]}). If memory is short, lower "
                "caption.max_model_len or change caption.gpu_memory_utilization; or take caption.backend=transformers"
            ) from error


def choose_backend(settings: PrepareSettings) -> PrepareSettings:
    """The settings with ``caption.backend`` decided, which a line of the log tells; all workers then do the same.

    Raises:
        TrainerError: vLLM is asked for and cannot be had.
    """
    caption, why_not = settings.caption, ""
    if caption.model is None:
        return settings
    if caption.backend != "transformers":
        why_not = why_not_vllm(settings)
    if why_not and caption.backend == "vllm":
        raise TrainerError(f"caption.backend=vllm: {why_not}")
    backend = "transformers" if why_not or caption.backend == "transformers" else "vllm"
    logger.info("captions by %s on %s%s", backend, caption.device, f"; vLLM: {why_not}" if why_not else "")
    return settings.model_copy(update={"caption": caption.model_copy(update={"backend": backend})})


def why_not_vllm(settings: PrepareSettings) -> str:
    """Why vLLM cannot write the captions; empty if it can."""
    if find_spec("vllm") is None:
        return "it is not installed: pip install 'feedface[vllm]'"
    device = settings.caption.device
    if device not in ("cuda", "cuda:0"):
        return f"it takes the first GPU, caption.device=cuda, and caption.device is {device}"
    if settings.runner == "processes" and settings.workers > 1:
        return f"each of workers={settings.workers} would start an engine on one GPU; take workers=1, or runner=ray"
    try:
        from vllm import ModelRegistry
    except ImportError as error:
        return f"it cannot be imported ({error})"
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    folder = model_folder(settings.caption)
    try:
        config, decoding = AutoConfig.from_pretrained(folder, local_files_only=True), generation_config(folder)
    except (OSError, ValueError, KeyError) as error:
        raise no_model(folder, error) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise no_model(folder, f"a {config.model_type}")
    known, own = ModelRegistry.get_supported_archs(), config.architectures or []
    if not any(name in known for name in own):
        return f"it does not know {', '.join(own) or 'a model without architectures in its config.json'}"
    if (decoding.num_beams or 1) > 1 or decoding.no_repeat_ngram_size:
        return "the model's generation_config.json asks for beams or no_repeat_ngram_size, which it does not have"
    return ""


def model_folder(settings: CaptionSettings) -> Path:
    """``caption.model`` as a path.

    Raises:
        TrainerError: it is no folder of a transformers model.
    """
    folder = Path(settings.model).expanduser()
    if not (folder / "config.json").is_file():
        raise TrainerError(f"caption.model {folder}: no folder with a transformers model (no config.json)")
    return folder


def no_model(folder: Path, why: object) -> TrainerError:
    """The error of a folder with something else in it."""
    return TrainerError(f"caption.model {folder}: not an image-to-text model ({why})")


def load_processor(folder: Path) -> Any:
    """What makes a model's inputs of texts and pictures."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def generation_config(folder: Path) -> Any:
    """How the model is to be decoded by its own files; transformers goes by it without being told."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # there is none
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def make_prompt(processor: Any, prompt: str | None) -> str | None:
    """The text that the model goes on from: in the words of its chat template, if it has one."""
    if not getattr(processor, "chat_template", None):
        return prompt
    question = {"type": "text", "text": prompt or DEFAULT_PROMPT}
    message = {"role": "user", "content": [{"type": "image"}, question]}
    return processor.apply_chat_template([message], add_generation_prompt=True)
