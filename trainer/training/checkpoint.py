"""Checkpoints that survive being killed at any moment, and a lock on the folder they are in.

A checkpoint is a folder ``checkpoint-<step>`` of safetensors files and a ``state.json``, with a ``manifest.json`` of
sizes and hashes. It is written under a temporary name, flushed to the disk and renamed, so a folder with the final name
is complete. ``latest`` names the newest one. Nothing in it is pickled. A sharded run's tensors are in one file for each
process (:mod:`trainer.training.sharded_checkpoint`); they are read as those of any other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from feedface_core.errors import shorten, typed
from feedface_core.files.atomic import replacing
from feedface_core.files.json_file import regular_file

from ..errors import TrainerError

logger = logging.getLogger(__name__)

PREFIX, TEMPORARY = "checkpoint-", ".writing-"
STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
SHARD = "shard-"  # how torch.distributed.checkpoint calls the files of its processes
FORMAT_VERSION = 1
TensorFiles = Mapping[str, Mapping[str, Tensor]]


class _Entry(BaseModel, strict=True):
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class _State(BaseModel, strict=True):
    """What every state holds; the rest is the caller's."""

    format_version: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=0, le=10**12)]


_ENTRIES, _STATE = TypeAdapter(dict[str, _Entry]), TypeAdapter(_State)


class CheckpointError(TrainerError):
    """A checkpoint that cannot be written or read; those before it are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole.

    Args:
        path: its folder.
        tensors: name of the file without suffix → tensors by name: ``trainables`` (the model's state), ``optimiser``
            and, where it is kept, ``ema``. Empty where they were not read.
        state: the JSON values that were saved with them.
    """

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict

    @property
    def sharded(self) -> bool:
        """Whether its tensors lie in a file for each process."""
        return any(self.path.glob(f"{SHARD}*"))

    @property
    def step(self) -> int:
        """Optimiser steps behind it."""
        return int(self.state["step"])

    def weights(self, which: Literal["auto", "ema", "raw"] = "auto") -> dict[str, Tensor]:
        """The model's state with its moving average, or as it was trained; ``auto`` takes the average where it is kept.

        Raises:
            CheckpointError: when the moving average is asked for and was not kept.
        """
        average = self.tensors.get("ema")
        if which == "ema" and average is None:
            raise CheckpointError(
                f"{self.path} has no moving average: train with train.ema=0.9999, or take raw weights"
            )
        return {**self.tensors["trainables"], **(average if average and which != "raw" else {})}


def save_checkpoint(output: Path, files: TensorFiles, state: Mapping, keep: int) -> Path:
    """Write a checkpoint, point ``latest`` to it, and delete all but the newest ``keep``.

    Args:
        output: the run's folder.
        files: tensors of each file.
        state: JSON values; ``step`` names the folder.

    Raises:
        CheckpointError: when there is no room, or the disk fails. Nothing of the new checkpoint stays, and the ones
            before it stay as they are.
    """
    needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    with writing(output, int(state["step"])) as temporary:
        make_room(temporary, needed)
        for name, tensors in files.items():
            on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(on_cpu, temporary / f"{name}.safetensors")
        return publish(temporary, state, [describe_file(path) for path in temporary.iterdir()], keep)


@contextmanager
def writing(output: Path, step: int) -> Iterator[Path]:
    """The folder in which the checkpoint of a step is written, which goes away when it fails.

    Raises:
        CheckpointError: in the place of what the disk raises.
    """
    final = output / f"{PREFIX}{step:08d}"
    temporary = output / f"{TEMPORARY}{final.name}"
    try:
        yield temporary
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        raise CheckpointError(
            f"cannot write {final}: {'the disk is full: ' if full else ''}{error}. Last good checkpoint: "
            f"{newest_name(output)}. Free some space (or lower train.keep) and start again to go on from there"
        ) from error


def make_room(temporary: Path, needed: int) -> None:
    """An empty folder where so many bytes have room. Raises ``OSError`` when they have not."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(temporary.parent).free
    if free < needed * 1.02 + 2**20:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:.0f} MB needed, {free / 2**20:.0f} MB free")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()


def publish(temporary: Path, state: Mapping, described: Iterable[tuple[str, Mapping]], keep: int) -> Path:
    """Make a checkpoint of what was written: its state and manifest, its name, and ``latest``; delete the oldest.

    Args:
        temporary: from :func:`make_room`, with the files of tensors in it.
        described: each of them, from :func:`describe_file`.
    """
    output, final = temporary.parent, temporary.with_name(temporary.name[len(TEMPORARY) :])
    text = json.dumps({**state, "format_version": FORMAT_VERSION}, indent=1, sort_keys=True)
    (temporary / STATE).write_text(text, encoding="utf-8")
    entries = dict(sorted([*described, describe_file(temporary / STATE)]))
    (temporary / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")
    for path in (temporary / MANIFEST, temporary):
        _flush(path)
    if final.exists():  # a broken one that training has passed again
        shutil.rmtree(final)
    os.rename(temporary, final)
    _flush(output)
    with replacing(output / LATEST) as partial:
        partial.write_text(final.name + "\n", encoding="utf-8")
    for old in list_checkpoints(output)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def describe_file(path: Path) -> tuple[str, dict[str, int | str]]:
    """A file flushed to the disk: its name, and what the manifest says of it."""
    _flush(path)
    return path.name, {"bytes": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows has no such call for folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    return sorted((path for path in output.glob(f"{PREFIX}*") if path.is_dir()), reverse=True)


def newest_name(output: Path) -> str:
    """Name of a run's newest checkpoint, for messages; ``none`` without any."""
    return next((path.name for path in list_checkpoints(output)), "none")


def load_checkpoint(path: Path, tensors: bool = True) -> Checkpoint:
    """Read one checkpoint and check it against its manifest.

    Args:
        tensors: False checks their files, but leaves them unread.

    Raises:
        CheckpointError: for a file that is missing, cut short or changed.
    """
    try:
        regular_file(path / MANIFEST)
        entries = typed(_ENTRIES, (path / MANIFEST).read_text(encoding="utf-8"))
        shards = [name for name in entries if name.startswith(SHARD)]
        if missing := {STATE, *([] if shards else ["trainables.safetensors"])} - entries.keys():
            raise CheckpointError(f"{path / MANIFEST} does not name {' and '.join(sorted(missing))}")
        for name, entry in entries.items():
            regular_file(path / name)
            size = (path / name).stat().st_size
            if size != entry.bytes:
                raise CheckpointError(f"{path / name} has {size} bytes, expected {entry.bytes}")
            if _hash(path / name) != entry.sha256:
                raise CheckpointError(f"{path / name} is not what was written (its hash differs)")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        version = typed(_STATE, state).format_version
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{path} is of format {version}, newer than {FORMAT_VERSION}: update the trainer")
        if not tensors:
            return Checkpoint(path, {}, state)
        if shards:
            from .sharded_checkpoint import read_shards

            return Checkpoint(path, read_shards(path), state)
        files = [path / name for name in entries if name.endswith(".safetensors")]
        return Checkpoint(path, {file.stem: load_file(file) for file in files}, state)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        # the path of the file by its name: where the folder's is long, nothing of it would be left in the message
        inside = isinstance(error, OSError) and error.filename and error.strerror
        found = f"{Path(error.filename).name}: {error.strerror}" if inside else shorten(error)
        raise CheckpointError(f"{path} cannot be read: {found}") from error


def load_latest(output: Path, tensors: bool = True) -> Checkpoint | None:
    """The newest sound checkpoint of a run; broken ones are skipped with a warning. None when there is none."""
    for path in list_checkpoints(output):
        try:
            return load_checkpoint(path, tensors)
        except CheckpointError as error:
            logger.warning("skipping a broken checkpoint: %s", error)
    return None


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Keeps a second run out of an output folder; released when the process ends, however it ends.

    Raises:
        TrainerError: names the process that holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(output / "run.lock"), output / "run.owner"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        owner = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise TrainerError(
            f"{output} is in use by {owner}. Wait for that run to end, or give another train.output"
        ) from error
    except OSError as error:
        raise TrainerError(f"train.output {output}: cannot be locked ({shorten(error)})") from error
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        for leftover in output.glob(f"{TEMPORARY}*"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        lock.release()
