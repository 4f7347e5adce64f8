"""The small text encoder and its tokenizer: CLIP's own formats, a closed vocabulary of captions, 32 tokens of width
128."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .people import CLOTHES, COLORS, EXPRESSIONS, FRAMINGS, HEADWEAR, PATTERNS

LENGTH = 32
WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    values = (*EXPRESSIONS, *HEADWEAR, *CLOTHES, *COLORS, *PATTERNS, *FRAMINGS)
    words = " ".join(values).replace("-", " - ").split()
    return sorted({*words, *"a an of person wearing glasses and background ,".split()} - {"none"})


def merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges of pairs, most frequent first, until every word is one token (Sennrich et al. 2016, algorithm 1).

    The trainer of the tokenizers library breaks ties differently each time.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    found = []
    while any(len(word) > 1 for word in split):
        pairs = Counter(pair for word in split for pair in zip(word, word[1:], strict=False))
        best = max(sorted(pairs), key=pairs.__getitem__)
        found.append(best)
        for k, word in enumerate(split):
            joined, i = [], 0
            while i < len(word):
                together = i + 1 < len(word) and (word[i], word[i + 1]) == best
                joined.append(word[i] + word[i + 1] if together else word[i])
                i += 2 if together else 1
            split[k] = joined
    return found


def write_clip_tokenizer(folder: Path, rules: Sequence[tuple[str, str]], length: int, pad: str = END) -> CLIPTokenizer:
    """Writes a CLIP tokenizer whose vocabulary is all bytes and what ``rules`` join.

    Args:
        rules: merges of two tokens into one, first ones first.
        length: longest text in tokens.
        pad: token that fills it up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    known = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens = dict.fromkeys([*known, *(a + b for a, b in rules), START, END])
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in rules), "utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    return CLIPTokenizer.from_pretrained(folder)


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes the tokenizer of the captions.

    Each word of :func:`vocabulary` is one token; any other text is spelt, and means nothing to the model.
    """
    return write_clip_tokenizer(folder, merges([word for word in vocabulary() if len(word) > 1]), LENGTH)


def create(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text transformer of two layers."""
    torch.manual_seed(3)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token numbers ``(N, 32)``, cut or filled up with the end token."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
