"""The names under which results are stored: hashes of everything that shaped them, so that nothing stored can be stale.

Whatever changes a result changes its key; the store then simply doesn't have it. Equal inputs share one entry.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.data.buckets import Placement
    from library.data.images import PixelSettings

LATENTS = "latents"
"""Name of the only tensor (C, h, w) in the entry of a picture. The entry of a caption has what
``TextEncodingStrategy.pack`` gives."""

MASK = "mask"
"""Name of the only tensor (1, h, w) in the entry of a mask."""

# Each rises with every change in data.images that gives other numbers for the same file and placement.
_PIXELS_VERSION = 2
_MASK_VERSION = 1

# JSON with sorted names is canonical for strings, whole numbers and booleans: equal values, equal text; other values,
# other text. Escapes keep it valid for captions that aren't valid Unicode.
_JSON = json.JSONEncoder(ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def latent_key(
    content: str, placement: "Placement", flipped: bool, settings: "PixelSettings", signature: Mapping[str, str]
) -> str:
    """This names the latents of a picture.

    Args:
        content: Hash of the picture file's bytes.
        placement: How the picture is resized and cropped.
        flipped: Whether it is mirrored.
        settings: How its pixels are computed.
        signature: Everything else that shapes the result: ``LatentCachingStrategy.signature()`` and the precision.
    """
    return _key(
        _JSON(LATENTS),
        _JSON(_PIXELS_VERSION),
        _JSON(content),
        _record(placement),
        _JSON(bool(flipped)),
        _record(settings),
        _signature(signature),
    )


def mask_key(content: str, placement: "Placement", flipped: bool, *, alpha: bool, stride: int) -> str:
    """This names the mask of a picture on the grid of its latents.

    Args:
        content: Hash of the bytes of the file that it is in.
        placement: How the picture that it belongs to is resized and cropped.
        flipped: Whether that is mirrored.
        alpha: Whether the mask is the file's transparency.
        stride: Pixels per latent position.
    """
    return _key(
        _JSON(MASK),
        _JSON(_MASK_VERSION),
        _JSON(content),
        _record(placement),
        _JSON(bool(flipped)),
        _JSON(bool(alpha)),
        _JSON(int(stride)),
    )


def text_key(caption: str, signature: Mapping[str, str]) -> str:
    """This names the text features of a caption.

    Args:
        caption: As it is encoded, after prefixes and the like.
        signature: Everything else that shapes the result: ``TextEncodingStrategy.signature()`` and the precision.
    """
    return _key(_JSON("text"), _JSON(caption), _signature(signature))


def _key(*parts: str) -> str:
    """The hash of a JSON list of these parts."""
    return hashlib.blake2b(f"[{','.join(parts)}]".encode(), digest_size=20).hexdigest()


def _signature(signature: Mapping[str, str]) -> str:
    return _signature_of(tuple(signature.items()))


@functools.lru_cache(maxsize=64)
def _signature_of(items: tuple[tuple[str, str], ...]) -> str:
    if wrong := sorted(str(name) for name, text in items if not isinstance(text, str)):
        raise ValueError(f"a signature maps names to text; {', '.join(wrong)} is something else")
    return _JSON(dict(items))


# Few placements serve many pictures. Their types count: tuples of several kinds may be equal.
@functools.lru_cache(maxsize=1 << 14, typed=True)
def _record(value: Any) -> str:
    return _JSON(_plain(value))


def _plain(value: Any) -> Any:
    """Records with their field names, so that a new field changes every key."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value
