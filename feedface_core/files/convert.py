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
import contextlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..config import AdapterConfig
from ..hosts.uvit import UViT
from ..hosts.uvit_config import UViTConfig
from ..modules.encoder import check_tensors
from . import released
from .adapter_file import adapter_metadata, expected_shapes, load_adapter
from .atomic import replacing, save_readable

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ENCODER = "encoder.vision_model."
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Conversion:
    """What goes into one output file.

    Args:
        path: of the source.
        kind: a key of what :func:`feedface_core.files.released.kind` tells apart.
        tensors: by the keys of the output.
        metadata: of the output.
        left_out: keys of the source that the output does not carry.
        config: of an adapter.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    config: AdapterConfig | None = None

    def size(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of the tensors, with the floating-point ones in ``dtype``."""
        return sum(_bytes(tensor, dtype) for tensor in self.tensors.values())


def _bytes(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    return tensor.numel() * (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize


def plan(path: Path, caption_decoder: Path | None = None) -> Conversion:
    """Reads a released file and decides what its conversion holds; weights are not touched yet.

    Args:
        path: any of the released files.
        caption_decoder: for a U-ViT, where to take ``encode_prefix`` from.

    Raises:
        FileNotFoundError, ValueError: names the file, and what it is instead of a released one.
    """
    tensors, metadata = released.read_tensors(path)
    kind = released.kind(tensors)
    if kind is None:
        keys = sorted(tensors)
        raise ValueError(
            f"{path}: none of the released files (uvit_v1.pth, caption_decoder.pth, feed-4800000.pt); it "
            f"holds {len(keys)} tensors such as {', '.join(keys[:3])}"
        )
    if caption_decoder is not None and kind != "uvit":
        raise ValueError(
            f"--caption-decoder goes with the U-ViT, but {path} is "
            f"{'the FeedFace adapter' if kind == 'adapter' else 'the caption decoder itself'}"
        )
    if kind == "adapter":
        return _plan_adapter(tensors, path)
    if kind == "uvit":
        return _plan_uvit(tensors, metadata, path, caption_decoder)
    kept = {key: tensor for key, tensor in tensors.items() if key.startswith(("encode_prefix.", "decode_prefix."))}
    left_out = tuple(sorted(tensors.keys() - kept.keys()))
    return Conversion(path, kind, kept, {"format": "unidiffuser-caption-decoder"}, left_out)


def _plan_adapter(tensors: dict[str, Tensor], path: Path) -> Conversion:
    config, adapter, encoder = released.read_adapter(tensors, path)
    check_tensors(str(path), expected_shapes(config), adapter)
    encoder = {_ENCODER + key: tensor for key, tensor in encoder.items() if not key.endswith("position_ids")}
    return Conversion(path, "adapter", {**adapter, **encoder}, config=config)


def _plan_uvit(
    tensors: dict[str, Tensor], metadata: Mapping[str, str], path: Path, caption_decoder: Path | None
) -> Conversion:
    try:
        config = UViTConfig.from_state_dict(tensors, released.settings_for(path, tensors, metadata))
        expected = {name: tuple(tensor.shape) for name, tensor in UViT(config, device="meta").state_dict().items()}
        uvit = {key: tensor for key, tensor in tensors.items() if not key.startswith("encode_prefix.")}
        check_tensors("UniDiffuser's U-ViT", expected, uvit)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if caption_decoder is not None:
        tensors = {**tensors, **released.read_prefix(caption_decoder)}
    return Conversion(
        path,
        "uvit",
        tensors,
        {
            "format": "unidiffuser-uvit",
            released.METADATA_KEY: json.dumps(config.settings()),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "unidiffuser-v1",
            "modelspec.title": "UniDiffuser v1",
            "modelspec.prediction_type": "epsilon",
        },
    )


def cast(conversion: Conversion, dtype: torch.dtype | None, progress: Progress = lambda count: None) -> Conversion:
    """The conversion with its floating-point tensors in ``dtype`` (unchanged when None), and final metadata.

    Args:
        progress: called with the bytes done since the last call.

    Raises:
        ValueError: for weights that ``dtype`` cannot hold.
    """
    tensors = {}
    for key, tensor in conversion.tensors.items():
        tensors[key] = _cast(tensor, dtype, f"{conversion.path}: {key}")
        progress(_bytes(tensors[key]))
    metadata = conversion.metadata
    if conversion.config is not None:
        metadata = {**metadata, **adapter_metadata(conversion.config, tensors)}
    return replace(conversion, tensors=tensors, metadata=metadata)


def _cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor.detach().contiguous()
    cast = tensor.detach().to(dtype).contiguous()
    if not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
        raise ValueError(f"{name} reaches {float(tensor.abs().max()):.3g}, which {dtype} cannot hold; use bf16")
    return cast


def write(conversion: Conversion, target: Path, progress: Progress = lambda count: None) -> Path:
    """Writes under a temporary name, reads back, compares every tensor bit by bit, and renames.

    Args:
        progress: called with the bytes done since the last call; twice the size in all, writing and checking.

    Raises:
        OSError: not enough room on the disk, before anything is written.
        ValueError: the file that was written is not what was to be written.
    """
    size = conversion.size()
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < size + (1 << 20):
        raise OSError(f"{target}: needs {size / 1e9:.2f} GB, but {target.parent} has {free / 1e9:.2f} GB free")
    with replacing(target) as temporary:
        with _watched(temporary, size, progress):
            save_readable(conversion.tensors, temporary, conversion.metadata)
        verify(conversion, temporary, progress)
    if conversion.kind == "adapter":
        load_adapter(target)
    return target


@contextlib.contextmanager
def _watched(path: Path, size: int, progress: Progress, interval: float = 0.1) -> Iterator[None]:
    """Reports the growth of a file that a library writes in one call."""
    done, finished = 0, threading.Event()

    def report(now: int) -> None:
        nonlocal done
        if now > done:
            progress(now - done)
            done = now

    def watch() -> None:
        while not finished.wait(interval):
            with contextlib.suppress(FileNotFoundError):
                report(min(path.stat().st_size, size))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    report(size)


def verify(conversion: Conversion, path: Path, progress: Progress = lambda count: None) -> None:
    """Raises ``ValueError`` unless the file holds exactly the conversion's tensors and metadata."""
    with safe_open(str(path), framework="pt") as file:
        keys = set(file.keys())
        if keys != conversion.tensors.keys():
            raise ValueError(f"{path}: written keys differ: {sorted(keys ^ conversion.tensors.keys())[:3]}")
        if dict(file.metadata() or {}) != conversion.metadata:
            raise ValueError(f"{path}: written metadata differ")
        for key, tensor in conversion.tensors.items():
            written = file.get_tensor(key)
            if written.dtype != tensor.dtype or not torch.equal(written, tensor):
                raise ValueError(f"{path}: {key} reads back differently: the disk or the memory is faulty")
            progress(_bytes(tensor))


def target_for(source: Path, dtype: str | None, folder: Path | None) -> Path:
    """``NAME.safetensors`` or ``NAME-fp16.safetensors``, beside the source or in the folder."""
    suffix = f"-{dtype}" if dtype else ""
    return (folder or source.parent) / f"{source.stem}{suffix}.safetensors"


def convert(source: Path, target: Path, dtype: str | None, caption_decoder: Path | None) -> None:
    """One file, with a progress bar on stderr and a line on stdout."""
    from tqdm import tqdm

    conversion = plan(source, caption_decoder)
    chosen = DTYPES[dtype] if dtype else None
    with tqdm(total=3 * conversion.size(chosen), desc=source.name, unit="B", unit_scale=True) as bar:
        conversion = cast(conversion, chosen, bar.update)
        write(conversion, target, bar.update)
    left_out = f", {len(conversion.left_out)} not needed left out" if conversion.left_out else ""
    print(
        f"{target}: {len(conversion.tensors)} tensors{left_out}, {target.stat().st_size / 1e6:.1f} MB "
        f"(was {source.stat().st_size / 1e6:.1f} MB), checked"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m feedface_core.files.convert", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="uvit_v1.pth, caption_decoder.pth or feed-4800000.pt, or several of them",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="fp16 halves the size; unchanged when left out")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to write; beside each file when left out")
    parser.add_argument(
        "--caption-decoder", type=Path, metavar="FILE", help="put its encode_prefix into the U-ViT's file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    options = parser.parse_args(arguments)
    targets = [target_for(source, options.dtype, options.output) for source in options.files]
    try:
        for source, target in zip(options.files, targets, strict=True):  # before anything long starts
            if not source.is_file():
                raise FileNotFoundError(f"no file {source}")
            if target.exists() and not options.overwrite:
                raise FileExistsError(f"{target} exists; give --overwrite or another --output")
        if len(set(targets)) != len(targets):
            raise ValueError(f"two of the files would be written to the same place: {', '.join(map(str, targets))}")
        for source, target in zip(options.files, targets, strict=True):
            convert(source, target, options.dtype, options.caption_decoder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
