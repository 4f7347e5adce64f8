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
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import AdapterConfig
from ..errors import FeedFaceError
from ..state_dict import describe, identify, read_state_dict
from . import released
from .adapter_file import adapter_metadata, load_adapter
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
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Conversion:
    """What goes into one output file.

    Args:
        path: of the source.
        tensors: by the keys of the output.
        metadata: of the output.
        left_out: keys of the source that the output does not carry.
        config: of an adapter.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    config: AdapterConfig | None = None

    def size(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of the tensors, with the floating-point ones in ``dtype``."""
        return sum(
            t.numel() * (dtype if dtype and t.is_floating_point() else t.dtype).itemsize for t in self.tensors.values()
        )


def plan(path: Path, caption_decoder: Path | None = None) -> Conversion:
    """Reads a released file and decides what its conversion holds; weights are not touched yet.

    Args:
        path: any of the released files.
        caption_decoder: for a U-ViT, where to take ``encode_prefix`` from.

    Raises:
        FileNotFoundError, FeedFaceError: names the file, and what it is instead of a released one.
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
        encoder = {f"encoder.vision_model.{key}": tensor for key, tensor in found.encoder_tensors.items()}
        return Conversion(path, {**found.tensors, **encoder}, config=found.config)
    if what == "uvit":
        uvit, prefix, config = released.read_uvit(path)
        prefix = prefix if caption_decoder is None else released.read_prefix(caption_decoder)
        settings = {released.METADATA_KEY: json.dumps(config.settings())}
        return Conversion(path, {**uvit, **prefix}, {**_METADATA[what], **settings})
    kept = {key: tensor for key, tensor in tensors.items() if key.startswith(("encode_prefix.", "decode_prefix."))}
    return Conversion(path, kept, _METADATA[what], tuple(sorted(tensors.keys() - kept.keys())))


def cast(conversion: Conversion, dtype: torch.dtype | None, progress: Progress = lambda count: None) -> Conversion:
    """The conversion with its floating-point tensors in ``dtype`` (unchanged when None), and final metadata.

    Args:
        progress: called with the bytes done since the last call.

    Raises:
        FeedFaceError: for weights that ``dtype`` cannot hold.
    """
    tensors = {}
    for key, tensor in conversion.tensors.items():
        done = tensors[key] = tensor.detach().to(dtype if tensor.is_floating_point() else None).contiguous()
        if done.is_floating_point() and not torch.isfinite(done).all():
            most = float(tensor.abs().max())
            raise FeedFaceError(f"{conversion.path}: {key} reaches {most:.3g}, which {dtype} cannot hold; use bf16")
        progress(done.nbytes)
    metadata = conversion.metadata
    if conversion.config is not None:
        metadata = {**metadata, **adapter_metadata(conversion.config, tensors)}
    return replace(conversion, tensors=tensors, metadata=metadata)


def write(conversion: Conversion, target: Path, progress: Progress = lambda count: None) -> Path:
    """Writes under a temporary name, reads back, compares every tensor bit by bit, and renames.

    Args:
        progress: called with the bytes done since the last call; twice the size in all, writing and checking.

    Raises:
        OSError: not enough room on the disk, before anything is written.
        FeedFaceError: the file that was written is not what was to be written.
    """
    size = conversion.size()
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < size + (1 << 20):
        raise OSError(f"{target}: needs {size / 1e9:.2f} GB, but {target.parent} has {free / 1e9:.2f} GB free")
    with replacing(target) as temporary:
        draft = write_safetensors(
            temporary.with_name(temporary.name + ".safetensors"), conversion.tensors, conversion.metadata
        )
        draft.replace(temporary)
        progress(size)
        _verify(conversion, temporary, progress)
    return target


def _verify(conversion: Conversion, path: Path, progress: Progress) -> None:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        if set(file.keys()) != conversion.tensors.keys() or dict(file.metadata() or {}) != conversion.metadata:
            raise FeedFaceError(f"{path}: the written keys or metadata differ")
        for key, tensor in conversion.tensors.items():
            written = file.get_tensor(key)
            if written.dtype != tensor.dtype or not torch.equal(written, tensor):
                raise FeedFaceError(f"{path}: {key} reads back differently: the disk or the memory is faulty")
            progress(tensor.nbytes)


def convert(source: Path, target: Path, dtype: str | None, caption_decoder: Path | None) -> None:
    """One file, with a progress bar on stderr and a line on stdout."""
    from tqdm import tqdm

    conversion, chosen = plan(source, caption_decoder), DTYPES.get(dtype)
    with tqdm(total=3 * conversion.size(chosen), desc=source.name, unit="B", unit_scale=True) as bar:
        conversion = cast(conversion, chosen, bar.update)
        write(conversion, target, bar.update)
    left_out = f", {len(conversion.left_out)} not needed left out" if conversion.left_out else ""
    before, after = source.stat().st_size / 1e6, target.stat().st_size / 1e6
    print(f"{target}: {len(conversion.tensors)} tensors{left_out}, {after:.1f} MB (was {before:.1f} MB), checked")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m feedface_core.files.convert", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="uvit_v1.pth, caption_decoder.pth or feed-4800000.pt"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="fp16 halves the size; unchanged when left out")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to write; beside each file when left out")
    parser.add_argument(
        "--caption-decoder", type=Path, metavar="FILE", help="put its encode_prefix into the U-ViT's file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    options = parser.parse_args(arguments)
    suffix = f"-{options.dtype}" if options.dtype else ""
    targets = [(options.output or path.parent) / f"{path.stem}{suffix}.safetensors" for path in options.files]
    try:
        for source, target in zip(options.files, targets, strict=True):  # before anything long starts
            if not source.is_file():
                raise FileNotFoundError(f"no file {source}")
            if target.exists() and not options.overwrite:
                raise FileExistsError(f"{target} exists; give --overwrite or another --output")
        if len(set(targets)) != len(targets):
            raise FeedFaceError(f"two of the files would be written to the same place: {', '.join(map(str, targets))}")
        for source, target in zip(options.files, targets, strict=True):
            convert(source, target, options.dtype, options.caption_decoder)
    except (OSError, FeedFaceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
