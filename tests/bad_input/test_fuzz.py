"""A minute of random damage to good files: read, or refused by the package's error."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from feedface_core.conditioning import Face
from feedface_core.errors import FeedFaceError
from feedface_core.files.adapter_file import load_adapter
from feedface_core.files.face_file import load_face, save_face
from tools.tiny_checkpoint import write_adapter

pytestmark = pytest.mark.slow
SECONDS = 30
WORDS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"\\ud800",
    b"\xff",
    b"\0",
    b"9" * 40,
]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four edits, most of them in the header, where the words are."""
    out = bytearray(data)
    end = min(8 + int.from_bytes(data[:8], "little"), len(data)) if rng.random() < 0.9 else len(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(end)
        match rng.randrange(4):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                out[at : at + rng.randint(1, 40)] = b""
            case 2:
                out[at:at] = rng.choice(WORDS)
            case 3:
                out[at : at + 4] = rng.choice(WORDS)
    if rng.random() < 0.5 and len(out) > 8:  # a header length that fits, so that the words are read
        grown = int.from_bytes(data[:8], "little") + len(out) - len(data)
        out[:8] = max(grown, 0).to_bytes(8, "little")
    return bytes(out)


def adapter(path: Path) -> None:
    write_adapter(path)


def face(path: Path) -> None:
    save_face(path, Face(torch.ones(2, 3, 4), (1.0, 0.5), "average", "abc"))


@pytest.mark.parametrize(("write", "read"), [(adapter, load_adapter), (face, load_face)], ids=["adapter", "face"])
def test_damaged_files(tmp_path: Path, write: Callable, read: Callable) -> None:
    good, broken, rng = tmp_path / "good.safetensors", tmp_path / "broken.safetensors", random.Random(0)
    write(good)
    data, stop, tried, refused = good.read_bytes(), time.monotonic() + SECONDS, 0, 0
    while time.monotonic() < stop:
        broken.write_bytes(damaged(data, rng))
        tried += 1
        try:
            read(broken)
        except FeedFaceError as error:
            refused += 1
            assert str(broken) in str(error) and len(str(error)) < 1500
    assert tried > 100 and refused > tried / 4
