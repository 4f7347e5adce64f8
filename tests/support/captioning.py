"""A small LLaVA with random weights, and a stand-in for the package vllm that runs it with transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

WORDS = "a man woman child smiles looks sits stands in the sun rain garden house hat".split()
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)


def make_llava(folder: Path) -> Path:
    """A model of which the text depends on the picture; every other photo or so is told apart."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(3)
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS]
    plain = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, padding_side="left", additional_special_tokens=["<image>"], **named
    )
    side = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessor(size=side, crop_size=side)
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16),
        text_config=transformers.LlamaConfig(**small, vocab_size=len(words), **ids),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(20 if weights.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


class VLLMValidationError(Exception):
    """What vLLM raises for one prompt."""


class Calls(list):
    """The calls of ``LLM.generate``, each the prompts and the sampling parameters; ``engines`` are the arguments of
    every ``LLM``."""

    def __init__(self) -> None:
        super().__init__()
        self.engines: list[dict[str, Any]] = []


def put_vllm(
    monkeypatch,
    architectures: tuple[str, ...] = ("LlavaForConditionalGeneration",),
    refuses: Callable[[Any], bool] = lambda picture: False,
    error: type[Exception] = VLLMValidationError,
) -> Calls:
    """Put the stand-in among the imported modules.

    Args:
        monkeypatch: takes it away again.
        architectures: that it knows.
        refuses: whether a picture makes the call fail that it is in.
        error: what such a call raises.
    """
    calls = Calls()

    class LLM:
        def __init__(self, model: str, **arguments: Any) -> None:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            calls.engines.append({"model": model, **arguments})
            self.processor = AutoProcessor.from_pretrained(model)
            self.model = AutoModelForImageTextToText.from_pretrained(model)

        @torch.no_grad()
        def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, *, use_tqdm: bool = True) -> list[Any]:
            assert sampling_params.temperature == 0
            calls.append((prompts, sampling_params))
            pictures = [prompt["multi_modal_data"]["image"] for prompt in prompts]
            if any(map(refuses, pictures)):
                raise error("the picture is too long")
            return [self._one(prompt, sampling_params) for prompt in prompts]

        def _one(self, prompt: dict[str, Any], sampling: Any) -> Any:
            picture = prompt["multi_modal_data"]["image"]
            inputs = self.processor(images=picture, text=prompt["prompt"], return_tensors="pt")
            ids = self.model.generate(**inputs, max_new_tokens=sampling.max_tokens, do_sample=False)
            text = self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            return SimpleNamespace(outputs=[SimpleNamespace(text=f" {text}\n")])

    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM = LLM
    module.SamplingParams = lambda **values: SimpleNamespace(**values)
    module.ModelRegistry = SimpleNamespace(get_supported_archs=lambda: set(architectures))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.exceptions", None)
    if error is VLLMValidationError:
        exceptions = ModuleType("vllm.exceptions")
        exceptions.VLLMClientError = VLLMValidationError
        monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)
    return calls


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
