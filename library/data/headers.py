"""What the first bytes of a picture file say, and whether its container is complete. Nothing is decoded.

This is the one place that finds a picture's orientation: the size that a scan remembers and the pixels that training
sees must never disagree about which way is up.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from library.data.formats import kind_of
from library.records import Resolution

EMPTY = "the file is empty"
UNKNOWN = "not a picture, or of an unknown kind"
CUT = "the file ends too early"
DAMAGED = "the picture is damaged"

MOST_PIXELS = 178_956_970
"""Pillow refuses more than this, so that a small file can't fill the memory."""

_MOST_PARTS = 1_000_000
"""Segments, chunks or boxes of a file; the parts of an honest one are longer."""

_MOST_BEFORE_PIXELS = 32 << 20
"""Bytes of a JPEG's segments before its pixels; joining them takes time that grows with the square of their length."""

_MOST_SCANS = 100
"""Times that a JPEG may go over its pixels; encoders write up to about twenty."""

_MOST_METADATA = 4
"""Packed texts of a PNG that are looked into; each may become 16 MiB."""

_NO_SIZE = Resolution(0, 0)
_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_EXIF_MARK = b"Exif\x00\x00"
_XMP_MARK = b"http://ns.adobe.com/xap/1.0/\x00"
_METADATA = (b"Raw profile type exif", b"XML:com.adobe.xmp")
"""The names under which PNGs keep what other kinds have places for."""

_MARKER = re.compile(rb"\xff[^\xff]", re.DOTALL)
"""Of a JPEG's segment; more bytes of 255 may stand before it."""

_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_TOO_MANY = f"{DAMAGED}: it has more parts than any picture"
_PNG_END = struct.pack(">I4s", 0, b"IEND")


class Header(NamedTuple):
    """What a picture file says about itself.

    Attributes:
        kind: Pillow's name of its kind; None: none that we know.
        size: As it is stored, before its orientation is applied; 0x0 when only a decoder can tell.
        orientation: 1 to 8, as EXIF counts them; 1 is upright.
        problem: Why it can't be a whole picture, or None.
    """

    kind: str | None
    size: Resolution = _NO_SIZE
    orientation: int = 1
    problem: str | None = None

    @property
    def upright_size(self) -> Resolution:
        """The size after the orientation is applied."""
        return Resolution(self.size.height, self.size.width) if self.orientation >= 5 else self.size


def read_header(data: bytes) -> Header:
    """This reads a picture's header and checks that the file goes on to its end."""
    kind = kind_of(data)
    if kind is None:
        return Header(None, problem=UNKNOWN if data else EMPTY)
    try:
        header = _READERS[kind](data)
    except (struct.error, IndexError, zlib.error):
        return Header(kind, problem=CUT)
    if header.problem is None and header.size != _NO_SIZE:
        return header._replace(problem=size_problem(header.size))
    return header


def size_problem(size: Resolution) -> str | None:
    """Why a picture of this size can't be decoded, or None."""
    if min(size) < 1:
        return f"{DAMAGED}: its size is {size}"
    if size.area > MOST_PIXELS:
        return f"{size} are more pixels than can be decoded safely ({MOST_PIXELS // 10**6} million)"
    return None


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation that a picture's metadata asks for, 1 to 8; XMP is asked where EXIF says nothing."""
    value = _exif_orientation(exif)
    if value is None and (match := _XMP_ORIENTATION.search(xmp)):
        value = int(match[1])
    return value if value is not None and 1 <= value <= 8 else 1


def _exif_orientation(exif: bytes) -> int | None:
    tiff = exif.removeprefix(_EXIF_MARK)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, form = struct.unpack_from(order + "HH", tiff, entry)
            if tag == _ORIENTATION:
                return struct.unpack_from(order + {1: "B", 4: "I"}.get(form, "H"), tiff, entry + 8)[0]
    except struct.error:
        pass  # broken metadata doesn't make a broken picture
    return None


def _jpeg(data: bytes) -> Header:
    exif = xmp = b""
    size = None
    position, several_scans, colours = 2, False, 0
    for _ in range(_MOST_PARTS):
        match = _MARKER.search(data, position)
        if match is None:
            return Header("JPEG", problem=CUT)
        position = match.end() - 2
        marker = data[position + 1]
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # markers without content
            position += 2
            continue
        if marker == 0xD9:
            return Header("JPEG", problem=f"{DAMAGED}: it has no pixels")
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == 0xDA:
            several_scans |= data[position + 4] < colours
            break
        if marker == 0xE1:
            segment = data[position + 4 : position + 2 + length]
            if segment.startswith(_EXIF_MARK):
                exif = exif or segment
            elif segment.startswith(_XMP_MARK):
                xmp = segment
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, position + 5)
            size = Resolution(width, height)
            colours, several_scans = data[position + 9], marker in _PROGRESSIVE
        position += 2 + length
        if position > _MOST_BEFORE_PIXELS:
            break
    else:
        return Header("JPEG", problem=_TOO_MANY)
    if position > _MOST_BEFORE_PIXELS:
        return Header("JPEG", problem=f"{DAMAGED}: it has more metadata than any picture")
    if size is None:
        return Header("JPEG", problem=f"{DAMAGED}: it has no size")
    if several_scans and data.count(b"\xff\xda", position) > _MOST_SCANS:
        return Header("JPEG", size, problem=f"{DAMAGED}: it goes over its pixels more than {_MOST_SCANS} times")
    # entropy-coded data can't hold this pair of bytes, the thumbnail inside EXIF was skipped
    complete = data.endswith(b"\xff\xd9") or data.rfind(b"\xff\xd9", position) > 0
    return Header("JPEG", size, orientation_of(exif, xmp), None if complete else CUT)


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    exif = xmp = b""
    position, end, texts = 8, len(data), 0
    chunk = struct.Struct(">I4s").unpack_from
    for _ in range(_MOST_PARTS):
        if position + 12 > end:
            return Header("PNG", Resolution(width, height), problem=CUT)
        length, name = chunk(data, position)
        after = position + 12 + length
        if name == b"IDAT":
            pass
        elif name == b"IEND":
            return Header("PNG", Resolution(width, height), orientation_of(exif, xmp))
        elif name == b"eXIf":
            exif = data[position + 8 : after - 4]
        elif name in (b"tEXt", b"zTXt", b"iTXt") and texts < _MOST_METADATA:
            keyword, text = _png_text(name, data[position + 8 : after - 4])
            texts += keyword in _METADATA
            if keyword == b"Raw profile type exif":
                exif = exif or _raw_profile(text)
            elif keyword == b"XML:com.adobe.xmp":
                xmp = text
        position = after
    return Header("PNG", Resolution(width, height), problem=_TOO_MANY)


def _png_text(name: bytes, content: bytes) -> tuple[bytes, bytes]:
    """Keyword and text of a chunk; texts of other keywords than metadata's stay compressed."""
    keyword, _, rest = content.partition(b"\x00")
    compressed = name == b"zTXt"
    if name == b"iTXt":
        compressed = rest[:1] == b"\x01"
        rest = rest[2:].split(b"\x00", 2)[-1]
    elif compressed:
        rest = rest[1:]
    if compressed and keyword in _METADATA:
        rest = zlib.decompressobj().decompress(rest, 1 << 24)
    return keyword, rest


def _raw_profile(text: bytes) -> bytes:
    """EXIF as ImageMagick writes it: a name, a length, and hexadecimal digits in lines."""
    digits = b"".join(text.split(b"\n")[3:])
    try:
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return b""


def _webp(data: bytes) -> Header:
    exif = xmp = b""
    if data[12:16] == b"VP8X":
        size = Resolution(1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))
        for name, start, length in _riff_chunks(data):
            if name == b"EXIF":
                exif = data[start : start + length]
            elif name == b"XMP ":
                xmp = data[start : start + length]
    elif data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        size = Resolution(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    else:
        width, height = struct.unpack_from("<HH", data, 26)
        size = Resolution(width & 0x3FFF, height & 0x3FFF)
    (length,) = struct.unpack_from("<I", data, 4)
    return Header("WEBP", size, orientation_of(exif, xmp), CUT if length + 8 > len(data) else None)


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    position = 12
    for _ in range(_MOST_PARTS):
        if position + 8 > len(data):
            return
        name, length = struct.unpack_from("<4sI", data, position)
        yield name, position + 8, length
        position += 8 + length + length % 2


def _bmp(data: bytes) -> Header:
    claimed, _, start, header = struct.unpack_from("<IIII", data, 2)
    if header == 12:
        width, height, _, depth = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, depth, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression in (0, 3):  # plain rows; what the file claims is often wrong
        claimed = start + (width * depth + 31) // 32 * 4 * abs(height)
    return Header("BMP", Resolution(abs(width), abs(height)), problem=CUT if claimed > len(data) else None)


def _gif(data: bytes) -> Header:
    """Of the first frame, which is the one that is used."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _table_bytes(flags)
    while data[position] == 0x21:
        position = _after_blocks(data, position + 2)
    if data[position] != 0x2C:
        return Header("GIF", Resolution(width, height), problem=f"{DAMAGED}: it has no frame")
    left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, position + 1)
    _after_blocks(data, position + 10 + _table_bytes(flags) + 1)
    return Header("GIF", Resolution(max(width, left + frame_width), max(height, top + frame_height)))


def _table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, position: int) -> int:
    while length := data[position]:
        position += 1 + length
    return position + 1


def _boxes(kind: str, data: bytes) -> Header:
    """A container of boxes, whose pixels and size only a decoder understands."""
    position = 0
    for _ in range(_MOST_PARTS):
        if position >= len(data):
            break
        (length,) = struct.unpack_from(">I", data, position)
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, position + 8)
        if length == 0:  # the last box, which goes on to the end
            break
        if length < 8:
            return Header(kind, problem=f"{DAMAGED}: a box of {length} bytes")
        position += length
    else:
        return Header(kind, problem=_TOO_MANY)
    return Header(kind, problem=CUT if position > len(data) else None)


def _jxl(data: bytes) -> Header:
    return Header("JXL") if data.startswith(b"\xff\x0a") else _boxes("JXL", data)


_READERS = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "BMP": _bmp,
    "GIF": _gif,
    "AVIF": lambda data: _boxes("AVIF", data),
    "JXL": _jxl,
}
