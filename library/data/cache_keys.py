"""The names under which results are stored: hashes of everything that shaped them, so that nothing stored can be stale.

Whatever changes a result changes its key; the store then simply doesn't have it. Equal inputs share one entry.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.data.buckets import Placement

LATENTS = "latents"
"""Name of the only tensor (C, h, w) in the entry of a picture. The entry of a caption has one tensor per field of the
family's record, without the batch dimension."""

_PIXELS_VERSION = 1  # rises with every change in data.images that gives other pixels for the same file and placement


def latent_key(content: str, placement: "Placement", flipped: bool, signature: Mapping[str, str]) -> str:
    """This names the latents of a picture.

    Args:
        content: Hash of the picture file's bytes.
        placement: How the picture is resized and cropped.
        flipped: Whether it is mirrored.
        signature: Everything else that shapes the result: ``LatentCachingStrategy.signature()`` and the precision.
    """
    return _key(LATENTS, _PIXELS_VERSION, content, _plain(placement), bool(flipped), _plain(signature))


def text_key(caption: str, signature: Mapping[str, str]) -> str:
    """This names the text features of a caption.

    Args:
        caption: As it is encoded, after prefixes and the like.
        signature: Everything else that shapes the result: ``TextEncodingStrategy.signature()`` and the precision.
    """
    return _key("text", caption, _plain(signature))


def _key(*parts: Any) -> str:
    # JSON with sorted names is canonical for strings, whole numbers and booleans: equal parts, equal text; other parts,
    # other text. Escapes keep it valid for captions that aren't valid Unicode.
    encoded = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(encoded.encode(), digest_size=20).hexdigest()


def _plain(value: Any) -> Any:
    """Records and mappings as plain JSON, with their field names, so that a new field changes every key."""
    if isinstance(value, Mapping):
        if wrong := sorted(str(name) for name, text in value.items() if not isinstance(text, str)):
            raise ValueError(f"a signature maps names to text; {', '.join(wrong)} is something else")
        return dict(value)
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value
