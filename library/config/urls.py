"""Paths that are addresses of remote storage."""

import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_remote(path: str) -> bool:
    """Whether a path is a URL such as ``s3://bucket/folder``; a Windows drive is none."""
    return _SCHEME.match(path) is not None
