"""Marked pictures: readable by others, the same pixels, and nothing of the file lost."""

from __future__ import annotations

import io
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from feedface_core.files.provenance import SOURCE_TYPES, described, mark, source_type

TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
EXIF = {0x010F: "workflow:{}", 0x0110: "prompt:{}"}
KINDS = {
    "png": ("PNG", "RGB", {}),
    "png with alpha": ("PNG", "RGBA", {}),
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg with exif": ("JPEG", "RGB", {"exif": EXIF}),
    "webp": ("WEBP", "RGB", {}),
    "webp lossless": ("WEBP", "RGB", {"lossless": True}),
    "webp lossless with alpha": ("WEBP", "RGBA", {"lossless": True}),
    "webp with exif": ("WEBP", "RGB", {"exif": EXIF}),
    "webp with alpha": ("WEBP", "RGBA", {}),
}


def picture(kind: str, **more) -> bytes:
    name, mode, options = KINDS[kind]
    pixels = np.random.default_rng(0).integers(0, 255, (37, 50, len(mode)), dtype=np.uint8)
    if "exif" in options:
        exif = Image.Exif()
        for tag, text in options["exif"].items():
            exif[tag] = text
        options = options | {"exif": exif}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, name, **options, **more)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def packet_of(data: bytes) -> bytes:
    """The packet as Pillow finds it, which is another reader than ours."""
    info = opened(data).info
    packet = info.get("xmp") or info.get("XML:com.adobe.xmp")
    return packet.encode() if isinstance(packet, str) else packet


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCE_TYPES)
def test_mark_is_read_and_the_picture_is_the_same(kind: str, source: str) -> None:
    before = picture(kind)
    after = mark(before, source)
    description = next(
        ElementTree.fromstring(packet_of(after)).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    )
    assert description.attrib[IPTC] == source_type(after) == SOURCE_TYPES[source]
    one, other = opened(before), opened(after)
    assert (one.mode, one.size) == (other.mode, other.size) and np.array_equal(np.asarray(one), np.asarray(other))
    assert dict(one.getexif()) == dict(other.getexif())
    assert source_type(before) is None and not described(before)


@pytest.mark.parametrize("kind", KINDS)
def test_marked_twice_is_marked_once(kind: str) -> None:
    once = mark(picture(kind))
    assert mark(once, "edited photo") == once and source_type(once) == TRAINED


def test_texts_of_a_png_stay() -> None:
    texts = PngInfo()
    texts.add_text("workflow", '{"nodes": []}')
    texts.add_itxt("note", "größer", zip=True)
    info = opened(mark(picture("png", pnginfo=texts))).info
    assert info["workflow"] == '{"nodes": []}' and info["note"] == "größer"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "webp with exif"])
def test_xmp_of_somebody_else_is_left_alone(kind: str) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a>theirs</a></x:xmpmeta>'
    if kind == "png":
        texts = PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
        before = picture(kind, pnginfo=texts)
    else:
        before = picture(kind, xmp=xmp)
    assert described(before) and mark(before) == before and source_type(before) is None


def test_type_in_xmp_of_somebody_else_is_read() -> None:
    xmp = f"<d:Description><i:DigitalSourceType>{TRAINED}</i:DigitalSourceType></d:Description>"
    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", xmp, zip=True)
    assert source_type(picture("png", pnginfo=texts)) == TRAINED


def test_signed_files_are_left_alone() -> None:
    png, jpeg, webp = picture("png"), picture("jpeg"), picture("webp with exif")
    chunk = b"caBX" + b"manifest"
    png = png[:33] + struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]
    jpeg = jpeg[:2] + b"\xff\xeb" + struct.pack(">H", 12) + b"JP\0\1\0\0\0\1xx" + jpeg[2:]
    body = webp[8:] + b"C2PA" + struct.pack("<I", 4) + b"data"
    webp = b"RIFF" + struct.pack("<I", len(body)) + body
    for data in (png, jpeg, webp):
        opened(data)
        assert mark(data) == data and described(data)


def test_other_and_broken_files_come_back_as_they_are() -> None:
    gif = io.BytesIO()
    Image.new("L", (4, 4)).save(gif, "GIF")
    for data in (gif.getvalue(), b"", b"text", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"):
        assert mark(data) == data and source_type(data) is None


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "webp with exif"])
def test_cut_files_raise_nothing(kind: str) -> None:
    whole = picture(kind)
    for end in range(0, len(whole), max(1, len(whole) // 97)):
        cut = mark(whole[:end])
        assert cut == whole[:end] or whole[:end] in cut or source_type(cut) == TRAINED
