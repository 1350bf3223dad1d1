"""Amounts of memory, and ``auto`` in the place of a number."""

import re
from typing import Any

AUTO = "auto"

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", re.IGNORECASE)


def parse_size(value: Any) -> str:
    """This checks an amount of memory with its unit, or ``auto``; returns it as it is.

    Raises:
        ValueError: It is neither.
    """
    if str(value).lower() == AUTO:
        return AUTO
    found = _SIZE.fullmatch(str(value).strip())
    if found is None or found[2].upper() not in _UNITS or not size_in_bytes(str(value)):
        raise ValueError(f"expected an amount such as 12GiB, 11.5GiB or 24GB, or auto, got {str(value)[:40]!r}")
    return str(value).strip()


def size_in_bytes(text: str) -> int:
    """The bytes of an amount that ``parse_size`` took."""
    found = _SIZE.fullmatch(text.strip())
    assert found is not None, text
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_count_or_auto(value: Any) -> int | str:
    """This reads a whole number, or ``auto``.

    Raises:
        ValueError: It is neither.
    """
    if str(value).lower() == AUTO:
        return AUTO
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value).strip()):
        raise ValueError(f"expected a whole number of at least 0, or auto, got {str(value)[:40]!r}")
    return int(value)
