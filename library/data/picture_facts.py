"""What one look into a picture file tells: content hash, size, whether it is whole, and what else is asked for."""

import functools
import hashlib
from typing import NamedTuple

from library.io.places import FileEntry, read_bytes

Face = tuple[int, int, int, int]
"""Centre and size: x, y, width, height in pixels of the upright picture."""

MOST_BYTES = 1 << 30
"""Of a picture's file; the largest picture that can be decoded has about as many bytes when nothing is packed."""

_NO_FACE = ""


class Known(NamedTuple):
    """What is remembered about a picture; these are columns of a database.

    Attributes:
        content: Hash of the file's bytes; empty when it can't be read.
        width: Of the upright picture.
        height: The same.
        decoded: Whether it was decoded completely.
        face: The face found in the picture, as text; empty: there is none; None: nobody looked.
        near: Its hash for finding look-alikes, as a signed number; None: not computed.
    """

    content: str
    width: int = 0
    height: int = 0
    decoded: bool = False
    face: str | None = None
    near: int | None = None

    def face_box(self) -> Face | None:
        """The face that was found."""
        if not self.face:
            return None
        x, y, width, height = map(int, self.face.split())
        return x, y, width, height

    def near_hash(self) -> int | None:
        """The hash for finding look-alikes, as an unsigned number."""
        return None if self.near is None else self.near % (1 << 64)


class Wanted(NamedTuple):
    """What must be known about a picture, beyond its content, its size and that its container is whole."""

    decode: bool = False
    faces: bool = False
    near: bool = False

    def met_by(self, known: Known, path: str) -> bool:
        """Whether all of it is known."""
        if self.faces and known.face is None and face_in_name(path) is None:
            return False
        return (known.decoded or not self.decode) and (known.near is not None or not self.near)


def face_in_name(path: str) -> Face | None:
    """The face that a file's name tells; what the name says goes before what is found."""
    from library.data import faces

    return faces.face_in_name(path)


@functools.cache
def decoder() -> str:
    """The package that decodes pictures, with its version."""
    import importlib.metadata  # takes longer to load than all the rest here

    return f"pillow {importlib.metadata.version('pillow')}"


def look_at(entry: FileEntry, wanted: Wanted, known: Known | None) -> tuple[Known, str | None]:
    """This reads a picture file.

    Args:
        entry: The file.
        wanted: What must be known in the end.
        known: What is known already.

    Returns:
        What is known now, and why the picture can't be used, if so.

    Raises:
        ConfigError: Faces are wanted, and the package that finds them is missing.
    """
    from library.data import images  # Pillow is loaded only when a file must be read

    if entry.bytes > MOST_BYTES:
        return Known(""), f"its file of {entry.bytes:,} bytes is larger than any picture ({MOST_BYTES:,})"
    try:
        data = read_bytes(entry.path, most=MOST_BYTES)
    except OSError as error:
        return Known(""), error.strerror or str(error)
    content = hashlib.blake2b(data, digest_size=20).hexdigest()
    if known is None or known.content != content:
        known = Known(content)
    size, problem = images.peek(data)
    known = known._replace(width=size.width, height=size.height)
    if problem is None and wanted.decode and not known.decoded:
        problem = images.decode_problem(data)
        known = known._replace(decoded=problem is None)
    if problem is not None:
        return known, problem
    try:
        return _with_more(known, wanted, entry.path, data), None
    except OSError as error:  # what the header promised isn't there
        return known, error.strerror or str(error)


def _with_more(known: Known, wanted: Wanted, path: str, data: bytes) -> Known:
    """The same with the face and the hash, where they are wanted and not known."""
    if wanted.faces and known.face is None and face_in_name(path) is None:
        from library.data.faces import find_face

        face = find_face(data)
        known = known._replace(face=_NO_FACE if face is None else " ".join(map(str, face)))
    if wanted.near and known.near is None:
        from library.data.images import near_hash

        near = near_hash(data)
        known = known._replace(near=near - (1 << 64) if near >> 63 else near)
    return known
