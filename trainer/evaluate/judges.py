"""Networks that judge pictures by their prompts: CLIP and ImageReward. Neither is downloaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from feedface_core.config import CLIP_MEAN, CLIP_STD
from feedface_core.errors import shorten

from ..config.fields import as_path
from ..errors import TrainerError
from ..models.diffusers_files import load_clip_vision
from ..models.frozen_model import weights_fingerprint

logger = logging.getLogger(__name__)


class ClipJudge:
    """CLIP's similarity of pictures, faces and prompts (Radford et al. 2021): the cosine of its embeddings.

    Args:
        folder: with a transformers ``CLIPModel`` and its tokenizer.
        device: where it runs.

    Raises:
        TrainerError: there is no such model.
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer

        path = as_path(folder, "clip")
        if not (path / "config.json").is_file():
            raise TrainerError(
                f"clip {path}: no config.json in it; give a folder with a transformers CLIPModel and its tokenizer, "
                "such as a copy of openai/clip-vit-base-patch32"
            )
        self.model = load_clip_vision(CLIPModel, str(path), "clip", allow_hub=False).to(device).eval()
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # transformers raises many types for what is missing or broken
            raise TrainerError(f"clip {path}: no tokenizer that can be read ({shorten(error)})") from error
        self.device, self.name = device, path.resolve().name
        self.fingerprint = weights_fingerprint({"clip": self.model})
        self.side = self.model.config.vision_config.image_size

    @torch.no_grad()
    def images(self, images: Sequence[Tensor]) -> Tensor:
        """Pictures ``(H, W, 3)`` in 0…1 → embeddings ``(N, D)`` of unit length: their middle squares, as CLIP does."""
        pixels = torch.stack([self._square(image.to(self.device)) for image in images])
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        pooled = self.model.vision_model(pixel_values=(pixels - mean) / std).pooler_output
        return functional.normalize(self.model.visual_projection(pooled), dim=-1).cpu()

    def _square(self, image: Tensor) -> Tensor:
        height, width, _ = image.shape
        factor = self.side / min(height, width)
        size = [max(self.side, round(height * factor)), max(self.side, round(width * factor))]
        planes = image.permute(2, 0, 1).unsqueeze(0).float()
        planes = functional.interpolate(planes, size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        return planes[:, top : top + self.side, left : left + self.side]

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts → embeddings ``(N, D)`` of unit length; of long ones the first 77 tokens."""
        most = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": most, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).to(self.device)
        pooled = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return functional.normalize(self.model.text_projection(pooled), dim=-1).cpu()


class RewardJudge:
    """ImageReward (Xu et al. 2023), a model of what people prefer, from the package image-reward.

    Args:
        folder: with ``ImageReward.pt`` and ``med_config.json``.

    Raises:
        TrainerError: the package or a file is missing, or does not work.
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        path = as_path(folder, "image_reward")
        files = [path / "ImageReward.pt", path / "med_config.json"]
        if missing := [file.name for file in files if not file.is_file()]:
            raise TrainerError(f"image_reward {path}: has no {' and no '.join(missing)}")
        try:
            import ImageReward

            with redirect_stdout(StringIO()):  # it prints what it loads
                self.model = ImageReward.load(str(files[0]), device=device, med_config=str(files[1]))
        except Exception as error:  # of an old package among new libraries, anything
            raise TrainerError(
                f'image_reward: the package cannot be used ({shorten(error)}); "pip install image-reward", or leave '
                "image_reward out"
            ) from error
        self.fingerprint = f"{files[0].stat().st_size}"

    def score(self, prompt: str, picture: Path) -> float:
        """The reward of a picture for a prompt."""
        return float(self.model.score(prompt, str(picture)))
