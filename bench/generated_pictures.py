"""Folders of generated pictures with captions, as many as wanted, each with content of its own."""

import os
import random
from io import BytesIO
from pathlib import Path

from PIL import Image

_WORDS = (
    "red",
    "blue",
    "small",
    "large",
    "old",
    "wooden",
    "round",
    "bright",
    "cat",
    "dog",
    "tree",
    "house",
    "boat",
    "lamp",
)
_BASES = 64
_PER_SIZE = 16


def make_folder(folder: Path, count: int, *, longest: int = 320) -> Path:
    """This fills a folder with ``count`` JPEGs of about a thousand sizes, with a caption file each.

    The pixels of a few base pictures repeat; a comment in each file makes its content its own.

    Args:
        folder: Made when it is missing. Files that are there already stay.
        count: How many pictures.
        longest: The longest side in pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bases = [_jpeg(number, longest) for number in range(min(_BASES * _PER_SIZE, max(_BASES, count // 50)))]
    rng = random.Random(1)
    for number in range(count):
        stem = folder / f"picture_{number:06d}"
        base = bases[number % len(bases)]
        comment = f"picture {number}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        stem.with_suffix(".jpg").write_bytes(base[:2] + segment + base[2:])
        words = " ".join(rng.choice(_WORDS) for _ in range(18))
        stem.with_suffix(".txt").write_text(f"picture {number}, {words}", encoding="utf-8")
    age = os.stat(folder).st_mtime - 3600  # what has just changed isn't remembered
    for entry in os.scandir(folder):
        os.utime(entry.path, (age, age))
    return folder


def _jpeg(number: int, longest: int) -> bytes:
    rng = random.Random(number)
    size = (rng.randrange(longest // 2, longest), rng.randrange(longest // 2, longest))
    small = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
    buffer = BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
