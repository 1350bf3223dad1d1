"""Kinds of picture files: by the ending of their name, and by their first bytes."""

from importlib.util import find_spec
from typing import NamedTuple

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"\xff\x0a": "JXL",
    b"\x00\x00\x00\x0cJXL \r\n\x87\n": "JXL",
}
"""First bytes -> kind, in Pillow's names."""

_AVIF_BRANDS = (b"avif", b"avis")


class Plugin(NamedTuple):
    """What reads a kind of picture that Pillow may not read by itself.

    Attributes:
        kind: Pillow's name of the kind.
        own: The part of Pillow that reads it where Pillow was built with it; empty: Pillow never is.
        module: The module that teaches Pillow.
        package: The package to install for it.
    """

    kind: str
    own: str
    module: str
    package: str

    @property
    def is_needed(self) -> bool:
        """Whether Pillow can't read the kind by itself."""
        return not self.own or find_spec(self.own) is None

    @property
    def is_installed(self) -> bool:
        """Whether the module is here."""
        return find_spec(self.module) is not None


PLUGINS = {
    ".avif": Plugin("AVIF", "PIL._avif", "pillow_avif", "pillow-avif-plugin"),
    ".jxl": Plugin("JXL", "", "pillow_jxl", "pillow-jxl-plugin"),
}
"""Ending -> what may be needed to read it."""


def picture_extensions() -> tuple[str, ...]:
    """The endings of the pictures that can be read here, in small letters, with their dot."""
    known = [ending for ending, plugin in PLUGINS.items() if not plugin.is_needed or plugin.is_installed]
    return (*_ENDINGS, *known)


def unreadable_extensions() -> dict[str, str]:
    """The endings of the pictures that can't be read here -> the package that would read them."""
    readable = picture_extensions()
    return {ending: plugin.package for ending, plugin in PLUGINS.items() if ending not in readable}


def kind_of(data: bytes) -> str | None:
    """The kind of a picture by its first bytes, in Pillow's names; None: not a picture, or of an unknown kind."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = data[8 : min(len(data), int.from_bytes(data[:4], "big"), 256)]
        return "AVIF" if any(brand in brands for brand in _AVIF_BRANDS) else None
    return next((kind for signature, kind in _SIGNATURES.items() if data.startswith(signature)), None)
