"""Picture files of every kind, and colour profiles, made from numbers."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

XYZ_OF_SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
"""The columns are red, green and blue, seen under D50."""


def encoded(picture, kind, **options):
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def png(width, height, depth, colour_type, rows, *chunks):
    """A PNG with its samples as given; a chunk is (name, content), and goes before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, content) for name, content in parts)


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def exif(orientation, order="<", form=3, *, extra=0):
    """EXIF with an orientation, behind ``extra`` other entries."""
    entries = [struct.pack(order + "HHII", 0x0100 + number, 4, 1, 7) for number in range(extra)]
    value = struct.pack(order + {3: "HH", 4: "I"}[form], *([orientation, 0] if form == 3 else [orientation]))
    entries.append(struct.pack(order + "HHI", 0x0112, form, 1) + value)
    mark = {"<": b"II", ">": b"MM"}[order]
    body = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
    return b"Exif\x00\x00" + mark + struct.pack(order + "HI", 42, 8) + body


def rgb_profile(primaries=XYZ_OF_SRGB, gamma=2.2):
    """A profile of three primaries (columns, XYZ under D50) and a power curve."""
    tags = {b"rXYZ": primaries[:, 0], b"gXYZ": primaries[:, 1], b"bXYZ": primaries[:, 2]}
    encoded_tags = {name: _xyz(column) for name, column in tags.items()}
    return _profile(b"RGB ", b"XYZ ", {**encoded_tags, **{name: _curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}})


def grey_profile(gamma):
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile(lab_of_ink):
    """A profile whose colours are mixed from those of the 16 full inks; ``lab_of_ink`` maps (c, m, y, k) to Lab."""
    corners = [tuple(number >> bit & 1 for bit in (3, 2, 1, 0)) for number in range(16)]
    table = b"".join(
        bytes([round(light * 2.55), round(a + 128), round(b + 128)]) for light, a, b in map(lab_of_ink, corners)
    )
    straight = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (row == column) for row in range(3) for column in range(3)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + straight * 4 + table + straight * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut}, device=b"prtr")


def _profile(space, connection, tags, device=b"mntr"):
    text = b"test"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + b"\x00" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\x00",
        b"wtpt": _xyz((0.9642, 1.0, 0.8249)),
        **tags,
    }
    offset = 128 + 4 + 12 * len(tags)
    directory, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        directory += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"test", 0x02400000, device, space, connection)
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz((0.9642, 1.0, 0.8249))[8:]
    return header + bytes(128 - len(header)) + directory + body


def _xyz(values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
