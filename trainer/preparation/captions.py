"""The stage that describes photos: an image-to-text model for those that came without a caption."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config.preparation import CaptionSettings
from ..errors import TrainerError
from .photo import Batch, Photo, Stage

DEFAULT_PROMPT = "Describe this photo in one sentence."


class Caption(Stage):
    """Fills ``row["caption"]`` of photos without a caption of their own; ``row["captioned_by"]`` names the model.

    Args:
        settings: ``model`` is a folder with a transformers image-to-text model (BLIP, GIT, LLaVA, …).

    Raises:
        TrainerError: a folder that is missing or holds no such model.
    """

    def __init__(self, settings: CaptionSettings) -> None:
        self.settings = settings
        self.model = self.processor = None
        if settings.model is None:
            return
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = Path(settings.model).expanduser()
        if not (folder / "config.json").is_file():
            raise TrainerError(f"caption.model {folder}: no folder with a transformers model (no config.json)")
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise TrainerError(f"caption.model {folder}: not an image-to-text model ({error})") from error
        self.model = self.model.eval().to(settings.device)

    def __call__(self, batch: Batch) -> Batch:
        todo = [photo for photo in batch if photo.kept and not photo.given.get("caption")]
        if todo and self.model is not None:
            for photo, text in zip(todo, self._describe(todo), strict=True):
                photo.row |= {"caption": text, "captioned_by": Path(self.settings.model).name}
        return batch

    def process(self, photo: Photo) -> None:
        self([photo])

    @torch.no_grad()
    def _describe(self, photos: Batch) -> list[str]:
        prompt = self._prompt()
        images = [photo.picture for photo in photos]
        text = {} if prompt is None else {"text": [prompt] * len(images), "padding": True}
        inputs = self.processor(images=images, return_tensors="pt", **text).to(self.settings.device)
        ids = self.model.generate(**inputs, max_new_tokens=self.settings.most_tokens, do_sample=False)
        given = inputs.get("input_ids")
        # Decoder-only models repeat what they were given.
        if given is not None and ids.shape[1] > given.shape[1] and torch.equal(ids[:, : given.shape[1]], given):
            ids = ids[:, given.shape[1] :]
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _prompt(self) -> str | None:
        if getattr(self.processor, "chat_template", None):
            question = {"type": "text", "text": self.settings.prompt or DEFAULT_PROMPT}
            message = {"role": "user", "content": [{"type": "image"}, question]}
            return self.processor.apply_chat_template([message], add_generation_prompt=True)
        return self.settings.prompt
