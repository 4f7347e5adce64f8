"""Stable Diffusion 1.x checkpoints with random weights, made on the spot, for tests and for trying things.

ComfyUI's ordinary checkpoint loader reads them: it knows SD 1.x by 320 model channels and context width 768,
and takes any number of levels and blocks from the file. Its text encoder has one size (CLIP ViT-L/14), and its
smallest autoencoder is TAESD's. A seed gives the same file on every machine.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

CONTEXT = 768
VOCABULARY = 49408
TEXT_LAYERS = 12


@dataclass(frozen=True)
class UNetSize:
    """The shape of an SD 1.x U-Net.

    Args:
        channels: model channels, the width of the first level.
        multipliers: width of each level, in model channels.
        blocks: residual blocks in each level on the way down (one more on the way up).
        transformers: transformer blocks in each attention of a level; 0 for a level without.
    """

    channels: int = 320
    multipliers: tuple[int, ...] = (1, 1)
    blocks: int = 1
    transformers: tuple[int, ...] = (1, 1)


TINY = UNetSize()
SD15 = UNetSize(multipliers=(1, 2, 4, 4), blocks=2, transformers=(1, 1, 1, 0))

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def linear(name: str, width_in: int, width_out: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (width_out, width_in)
    if bias:
        yield f"{name}.bias", (width_out,)


def convolution(name: str, width_in: int, width_out: int, kernel: int = 3, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (width_out, width_in, kernel, kernel)
    if bias:
        yield f"{name}.bias", (width_out,)


def norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def residual(name: str, width_in: int, width_out: int, embedding: int) -> Shapes:
    yield from norm(f"{name}.in_layers.0", width_in)
    yield from convolution(f"{name}.in_layers.2", width_in, width_out)
    yield from linear(f"{name}.emb_layers.1", embedding, width_out)
    yield from norm(f"{name}.out_layers.0", width_out)
    yield from convolution(f"{name}.out_layers.3", width_out, width_out)
    if width_in != width_out:
        yield from convolution(f"{name}.skip_connection", width_in, width_out, kernel=1)


def transformer(name: str, width: int, depth: int) -> Shapes:
    yield from norm(f"{name}.norm", width)
    yield from convolution(f"{name}.proj_in", width, width, kernel=1)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for attention, context in (("attn1", width), ("attn2", CONTEXT)):
            yield from linear(f"{block}.{attention}.to_q", width, width, bias=False)
            yield from linear(f"{block}.{attention}.to_k", context, width, bias=False)
            yield from linear(f"{block}.{attention}.to_v", context, width, bias=False)
            yield from linear(f"{block}.{attention}.to_out.0", width, width)
        yield from linear(f"{block}.ff.net.0.proj", width, 8 * width)
        yield from linear(f"{block}.ff.net.2", 4 * width, width)
        for number in (1, 2, 3):
            yield from norm(f"{block}.norm{number}", width)
    yield from convolution(f"{name}.proj_out", width, width, kernel=1)


def unet_shapes(size: UNetSize) -> Shapes:
    """Names and shapes of a U-Net in the layout of the original Stable Diffusion release."""
    embedding = 4 * size.channels
    yield from linear("time_embed.0", size.channels, embedding)
    yield from linear("time_embed.2", embedding, embedding)
    yield from convolution("input_blocks.0.0", 4, size.channels)
    width, index, skips = size.channels, 1, [size.channels]
    last = len(size.multipliers) - 1
    for level, (multiplier, depth) in enumerate(zip(size.multipliers, size.transformers, strict=True)):
        for _ in range(size.blocks):
            yield from residual(f"input_blocks.{index}.0", width, multiplier * size.channels, embedding)
            width = multiplier * size.channels
            if depth:
                yield from transformer(f"input_blocks.{index}.1", width, depth)
            skips.append(width)
            index += 1
        if level < last:
            yield from convolution(f"input_blocks.{index}.0.op", width, width)
            skips.append(width)
            index += 1
    yield from residual("middle_block.0", width, width, embedding)
    yield from transformer("middle_block.1", width, max(size.transformers))
    yield from residual("middle_block.2", width, width, embedding)
    index = 0
    for level in reversed(range(len(size.multipliers))):
        for block in range(size.blocks + 1):
            joined = width + skips.pop()
            width = size.multipliers[level] * size.channels
            yield from residual(f"output_blocks.{index}.0", joined, width, embedding)
            depth = size.transformers[level]
            if depth:
                yield from transformer(f"output_blocks.{index}.1", width, depth)
            if level and block == size.blocks:
                yield from convolution(f"output_blocks.{index}.{2 if depth else 1}.conv", width, width)
            index += 1
    yield from norm("out.0", width)
    yield from convolution("out.2", width, 4)


def text_encoder_shapes() -> Shapes:
    """CLIP ViT-L/14's text model, with the names of ``transformers``."""
    yield "embeddings.token_embedding.weight", (VOCABULARY, CONTEXT)
    yield "embeddings.position_embedding.weight", (77, CONTEXT)
    for index in range(TEXT_LAYERS):
        layer = f"encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{name}", CONTEXT, CONTEXT)
        yield from linear(f"{layer}.mlp.fc1", CONTEXT, 4 * CONTEXT)
        yield from linear(f"{layer}.mlp.fc2", 4 * CONTEXT, CONTEXT)
        yield from norm(f"{layer}.layer_norm1", CONTEXT)
        yield from norm(f"{layer}.layer_norm2", CONTEXT)
    yield from norm("final_layer_norm", CONTEXT)


def autoencoder_shapes() -> Shapes:
    """TAESD: 64 channels wide, eight times smaller at the latent."""

    def blocks(part: str, indexes: range) -> Shapes:
        for index in indexes:
            for place in (0, 2, 4):
                yield from convolution(f"{part}.{index}.conv.{place}", 64, 64)

    encoder, decoder = "taesd_encoder", "taesd_decoder"
    yield from convolution(f"{encoder}.0", 3, 64)
    yield from blocks(encoder, range(1, 2))
    for start in (2, 6, 10):
        yield from convolution(f"{encoder}.{start}", 64, 64, bias=False)
        yield from blocks(encoder, range(start + 1, start + 4))
    yield from convolution(f"{encoder}.14", 64, 4)
    yield from convolution(f"{decoder}.1", 4, 64)
    for start in (3, 8, 13):
        yield from blocks(decoder, range(start, start + 3))
        yield from convolution(f"{decoder}.{start + 4}", 64, 64, bias=False)
    yield from blocks(decoder, range(18, 19))
    yield from convolution(f"{decoder}.19", 64, 3)
    yield "vae_scale", ()
    yield "vae_shift", ()


def random_weights(shapes: Shapes, generator: torch.Generator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit size; norms start as the identity, biases at zero."""
    weights = {}
    for name, shape in shapes:
        if name == "vae_scale" or (len(shape) == 1 and name.endswith("weight")):
            weights[name] = torch.ones(shape, dtype=dtype)
        elif len(shape) < 2:
            weights[name] = torch.zeros(shape, dtype=dtype)
        else:
            spread = 1.0 if "embedding" in name else math.prod(shape[1:]) ** -0.5
            weights[name] = torch.randn(shape, generator=generator).mul_(spread).to(dtype)
    return weights


def unet_weights(size: UNetSize = TINY, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A U-Net's state dict, without a prefix."""
    return random_weights(unet_shapes(size), torch.Generator().manual_seed(seed), dtype)


def checkpoint_weights(
    size: UNetSize = TINY, seed: int = 0, dtype: torch.dtype = torch.float16, text_layers: int = 2
) -> dict[str, torch.Tensor]:
    """U-Net, text encoder and autoencoder under the names of a Stable Diffusion 1.x checkpoint.

    Args:
        size: of the U-Net.
        seed: the same seed gives the same weights.
        dtype: how they are stored.
        text_layers: layers of the text encoder that do something; the others are zero and pass their input on.
    """
    text = random_weights(
        (item for item in text_encoder_shapes() if layer_of(item[0]) < text_layers),
        torch.Generator().manual_seed(seed + 1),
        dtype,
    )
    text |= {name: torch.zeros(shape, dtype=dtype) for name, shape in text_encoder_shapes() if name not in text}
    autoencoder = random_weights(autoencoder_shapes(), torch.Generator().manual_seed(seed + 2), dtype)
    parts = {
        "model.diffusion_model.": unet_weights(size, seed, dtype),
        "cond_stage_model.transformer.text_model.": text,
        "first_stage_model.": autoencoder,
    }
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def layer_of(name: str) -> int:
    """The layer a tensor of the text encoder belongs to; -1 for what is in no layer."""
    found = re.match(r"encoder\.layers\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


def write_checkpoint(path: Path, size: UNetSize = TINY, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """Write a checkpoint for ComfyUI's checkpoint loader; returns its path."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint_weights(size, seed, dtype), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the .safetensors file to write")
    parser.add_argument("--sd15", action="store_true", help="the U-Net of SD 1.5 in its true size (1.7 GB)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = write_checkpoint(options.path, SD15 if options.sd15 else TINY, options.seed)
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
