"""Pictures that say a model made them: IPTC's digital source type as XMP, in PNG, JPEG and WebP files.

The packet is put into the file as it is; no pixel is encoded anew. Property and values are those of
https://cv.iptc.org/newscodes/digitalsourcetype, the places in the files those of Adobe's XMP specification, part 3.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from .atomic import replacing

_VALUES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
#: What a picture may be marked as: made by a model, or a photograph of which a model made a part.
SOURCE_TYPES = {
    "generated": _VALUES + "trainedAlgorithmicMedia",
    "edited photo": _VALUES + "compositeWithTrainedAlgorithmicMedia",
}
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    Iptc4xmpExt:DigitalSourceType="{}"
    xmp:CreatorTool="ComfyUI with FeedFace"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""
_PROPERTY = re.compile(rb"DigitalSourceType\s*(?:=\s*[\"']|>)\s*(?:<[^>]*>\s*)?([^\"'<\s]+)")

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_KEYWORD = b"XML:com.adobe.xmp\0"
_JPEG_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
_ALPHA, _XMP = 0x10, 0x04  # flags of WebP's VP8X chunk


def mark(data: bytes, kind: str = "generated") -> bytes:
    """The file with a note of what made the picture.

    A file that has XMP or a C2PA manifest comes back as it is, since the first may say something else, and the second
    is signed over the whole file; so does one that is no whole PNG, JPEG or WebP.

    Args:
        data: the file.
        kind: a key of :data:`SOURCE_TYPES`.
    """
    packet = _PACKET.format(SOURCE_TYPES[kind]).encode()
    try:
        if described(data):
            return data
        if data.startswith(_PNG):
            return _mark_png(data, packet)
        if data.startswith(_JPEG):
            return _mark_jpeg(data, packet)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _mark_webp(data, packet)
    except (struct.error, IndexError, ValueError, StopIteration):
        pass
    return data


def mark_file(path: Path, kind: str = "generated") -> None:
    """:func:`mark` for a file on the disk, in one piece. Raises ``OSError``."""
    before = path.read_bytes()
    if (after := mark(before, kind)) != before:
        with replacing(path) as temporary:
            temporary.write_bytes(after)


def described(data: bytes) -> bool:
    """Whether a PNG, JPEG or WebP file has XMP or a C2PA manifest."""
    return any(True for _ in _notes(data))


def source_type(data: bytes) -> str | None:
    """IPTC's digital source type in a PNG, JPEG or WebP file, an address; None where there is none."""
    found = (_PROPERTY.search(packet) for packet in _notes(data))
    return next((match[1].decode("utf-8", "replace") for match in found if match), None)


def _notes(data: bytes) -> Iterator[bytes]:
    """Packets of XMP, and an empty one for a C2PA manifest."""
    if data.startswith(_PNG):
        for name, start, end in _png_chunks(data):
            if name == b"iTXt" and data.startswith(_PNG_KEYWORD, start):
                yield _png_text(data[start + len(_PNG_KEYWORD) : end])
            elif name == b"caBX":
                yield b""
    elif data.startswith(_JPEG):
        for marker, start, end in _jpeg_segments(data):
            if marker == 0xE1 and data.startswith(_JPEG_HEADER, start):
                yield data[start + len(_JPEG_HEADER) : end]
            elif marker == 0xEB and data.startswith(b"JP", start):
                yield b""
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        for name, start, end in _webp_chunks(data):
            if name in (b"XMP ", b"C2PA"):
                yield data[start:end] if name == b"XMP " else b""


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each chunk."""
    place = len(_PNG)
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], place + 8, place + 8 + length
        place += 12 + length


def _png_text(rest: bytes) -> bytes:
    """The text of an iTXt chunk behind its keyword: two flags, language, translated keyword, text."""
    compressed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    try:
        return zlib.decompressobj().decompress(text, 2**20) if compressed else text
    except zlib.error:
        return b""


def _mark_png(data: bytes, packet: bytes) -> bytes:
    name, _, end = next(_png_chunks(data))
    if name != b"IHDR" or b"IEND" not in (one[0] for one in _png_chunks(data)):
        raise ValueError("no whole PNG")
    body = b"iTXt" + _PNG_KEYWORD + b"\0\0\0\0" + packet  # not compressed, no language, no translated keyword
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[: end + 4] + chunk + data[end + 4 :]


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the content of each segment before the picture itself."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        yield data[place + 1], place + 4, place + 2 + length
        place += 2 + length


def _mark_jpeg(data: bytes, packet: bytes) -> bytes:
    place = 2
    for marker, start, end in _jpeg_segments(data):  # JFIF and Exif come first
        if not (marker == 0xE0 or (marker == 0xE1 and data.startswith(b"Exif", start))):
            break
        place = end
    if data[place] != 0xFF:
        raise ValueError("no whole JPEG")
    body = _JPEG_HEADER + packet
    return data[:place] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[place:]


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each chunk; contents of odd length are followed by a zero."""
    place = 12
    while place + 8 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        yield data[place : place + 4], place + 8, place + 8 + length
        place += 8 + length + length % 2


def _mark_webp(data: bytes, packet: bytes) -> bytes:
    name, start, _ = next(_webp_chunks(data))
    if 8 + int.from_bytes(data[4:8], "little") > len(data):
        raise ValueError("no whole WebP")
    if name == b"VP8X":
        head, rest = bytes([data[start] | _XMP]) + data[start + 1 : start + 10], data[start + 10 :]
    else:
        width, height, alpha = _webp_size(name, data[start:])
        head = bytes([_XMP | (_ALPHA if alpha else 0), 0, 0, 0])
        head, rest = head + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"), data[12:]
    chunks = b"VP8X" + struct.pack("<I", 10) + head + rest
    chunks += b"XMP " + struct.pack("<I", len(packet)) + packet + b"\0" * (len(packet) % 2)
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def _webp_size(name: bytes, content: bytes) -> tuple[int, int, bool]:
    """Width and height in pixels, and whether there is an alpha channel, of a WebP file with a single chunk."""
    if name == b"VP8L" and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    if name == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", content[6:10])
        return width & 0x3FFF, height & 0x3FFF, False
    raise ValueError("no WebP with a picture first")
