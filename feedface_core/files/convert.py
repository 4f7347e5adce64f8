"""Writes the files of the published releases as safetensors: smaller, safe to open, and saying what they are.

    python -m feedface_core.files.convert uvit_v1.pth caption_decoder.pth feed-4800000.pt --dtype fp16

* ``uvit_v1.pth`` keeps its keys. With ``--caption-decoder FILE`` it takes ``encode_prefix`` along, so that one file is
  enough for FeedFace Load UniDiffuser.
* ``caption_decoder.pth`` keeps ``encode_prefix`` and ``decode_prefix`` and leaves its language model out.
* ``feed-4800000.pt`` becomes an adapter file with its config inside.

What cannot be read off the weights (attention heads) goes into the metadata. Every file is read back and compared with
its source before it gets its final name.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import FeedFaceError, MissingFile
from ..state_dict import describe, identify, read_state_dict
from . import released
from .adapter_file import adapter_contents, encoder_dtype, load_adapter
from .atomic import replacing, write_safetensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_METADATA = {
    "uvit": {
        "format": "unidiffuser-uvit",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "unidiffuser-v1",
        "modelspec.title": "UniDiffuser v1",
        "modelspec.prediction_type": "epsilon",
    },
    "caption_decoder": {"format": "unidiffuser-caption-decoder"},
}


@dataclass(frozen=True)
class Conversion:
    """What goes into one output file: tensors and metadata; and the keys of its source that it does not carry."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    left_out: tuple[str, ...] = ()


def plan(path: Path, dtype: torch.dtype | None = None, caption_decoder: Path | None = None) -> Conversion:
    """Reads a released file and makes what its conversion holds.

    Args:
        path: any of the released files.
        dtype: floating-point type of the weights, unchanged when None.
        caption_decoder: for a U-ViT, where to take ``encode_prefix`` from.

    Raises:
        FeedFaceError: names the file, what it is instead of a released one, or the weight that ``dtype`` cannot hold.
    """
    tensors, _ = read_state_dict(path)
    what = identify(tensors)
    if what not in ("uvit", "caption_decoder", "released_adapter"):
        raise FeedFaceError(
            f"{path}: none of the released files (uvit_v1.pth, caption_decoder.pth, feed-4800000.pt); "
            f"{describe(tensors)}"
        )
    if caption_decoder is not None and what != "uvit":
        raise FeedFaceError(f"--caption-decoder goes with the U-ViT; {path}: {describe(tensors)}")
    if what == "released_adapter":
        found = load_adapter(path)
        encoder = _cast(path, found.encoder_tensors, encoder_dtype(dtype))
        return Conversion(*adapter_contents(found.config, _cast(path, found.tensors, dtype), encoder))
    metadata, left_out = _METADATA[what], ()
    if what == "uvit":
        kept, prefix, config = released.read_uvit(path)
        kept |= prefix if caption_decoder is None else released.read_prefix(caption_decoder)
        metadata = {**metadata, released.METADATA_KEY: json.dumps(config.settings())}
    else:
        kept = {key: tensor for key, tensor in tensors.items() if key.startswith(("encode_prefix.", "decode_prefix."))}
        left_out = tuple(sorted(tensors.keys() - kept.keys()))
    return Conversion(_cast(path, kept, dtype), metadata, left_out)


def _cast(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    cast = {key: tensor.to(dtype if tensor.is_floating_point() else None) for key, tensor in tensors.items()}
    for key, tensor in cast.items():
        if not torch.isfinite(tensor).all():
            most = float(tensors[key].abs().max())
            advice = f"which {dtype} cannot hold; use bf16" if math.isfinite(most) else "expected finite weights"
            raise FeedFaceError(f"{path}: {key} reaches {most:.3g}, {advice}")
    return cast


def write(conversion: Conversion, target: Path) -> Path:
    """Writes under a temporary name, reads back, compares every tensor bit by bit, and renames.

    Raises:
        FeedFaceError: not enough room on the disk, before anything is written; or what was written reads differently.
    """
    from tqdm import tqdm

    size = sum(tensor.nbytes for tensor in conversion.tensors.values())
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < size + (1 << 20):
        raise FeedFaceError(f"{target}: needs {size / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free")
    with replacing(target) as temporary:
        write_safetensors(temporary, conversion.tensors, conversion.metadata)
        with safe_open(temporary, framework="pt") as file:
            if set(file.keys()) != conversion.tensors.keys() or dict(file.metadata() or {}) != conversion.metadata:
                raise FeedFaceError(f"{target}: the written keys or metadata differ")
            for key, tensor in tqdm(conversion.tensors.items(), desc=target.name, unit="tensors"):
                written = file.get_tensor(key)
                if written.dtype != tensor.dtype or not torch.equal(written, tensor):
                    raise FeedFaceError(f"{target}: {key} reads back differently: the disk or the memory is faulty")
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m feedface_core.files.convert", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="uvit_v1.pth, caption_decoder.pth or feed-4800000.pt")
    add("--dtype", choices=DTYPES, help="fp16 halves the size; unchanged when left out")
    add("--output", type=Path, metavar="FOLDER", help="where to write; beside each file when left out")
    add("--caption-decoder", type=Path, metavar="FILE", help="put its encode_prefix into the U-ViT's file")
    add("--overwrite", action="store_true", help="replace files that exist")
    options = parser.parse_args(arguments)
    suffix = f"-{options.dtype}.safetensors" if options.dtype else ".safetensors"
    targets = [(options.output or path.parent) / f"{path.stem}{suffix}" for path in options.files]
    try:
        for source, target in zip(options.files, targets, strict=True):  # before anything long starts
            if not os.path.isfile(source):
                raise MissingFile(f"{source}: no such file")
            if target.exists() and not options.overwrite:
                raise FeedFaceError(f"{target} exists; give --overwrite or another --output")
        if len(set(targets)) != len(targets):
            raise FeedFaceError(f"two of the files would be written to the same place: {', '.join(map(str, targets))}")
        for source, target in zip(options.files, targets, strict=True):
            conversion = plan(source, DTYPES.get(options.dtype), options.caption_decoder)
            write(conversion, target)
            left_out = f", {len(conversion.left_out)} not needed left out" if conversion.left_out else ""
            before, after = source.stat().st_size / 1e6, target.stat().st_size / 1e6
            print(
                f"{target}: {len(conversion.tensors)} tensors{left_out}, {after:.1f} MB (was {before:.1f} MB), checked"
            )
    except (OSError, FeedFaceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
