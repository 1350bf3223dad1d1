"""Where the face is in a picture: said by its file name, or found by OpenCV.

A face is its centre and size (x, y, width, height) in pixels of the upright picture.
"""

import re
from pathlib import PurePath

from library.config.errors import ConfigError

Face = tuple[int, int, int, int]

_NAMED = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)$")
_LONGEST = 640
_SMALLEST = 0.04  # of the longest side; what is smaller is mostly no face
_STEP = 1.1
_NEIGHBOURS = 5  # how often a face must be found at nearby places and sizes to count

_MISSING = (
    "finding faces needs OpenCV, version 4: pip install 'opencv-python-headless<5'; "
    "or end the pictures' names in _x_y_w_h, the centre and size of the face"
)


def face_in_name(path: str) -> Face | None:
    """The face that a file's name gives: ``portrait_512_300_180_200.png``; None: it gives none."""
    match = _NAMED.search(PurePath(path).stem)
    if match is None:
        return None
    x, y, width, height = (int(number) for number in match.groups())
    return (x, y, width, height) if width and height else None


def find_face(data: bytes) -> Face | None:
    """This finds the largest face that looks at the viewer; None: there is none.

    The method is the cascade of Haar features of Viola and Jones (2001), with the parameters that OpenCV brings.

    Args:
        data: The picture's file.

    Raises:
        ConfigError: OpenCV isn't installed, or is of a version without it.
        OSError: The picture can't be decoded.
    """
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    if not hasattr(cv2, "CascadeClassifier"):
        raise ConfigError(f"OpenCV {cv2.__version__} can't find faces; {_MISSING}")
    import numpy as np
    from cv2.data import haarcascades

    from library.data.images import peek, thumbnail

    size = peek(data)[0]
    small = thumbnail(data, _LONGEST).convert("L")
    # one per call: it keeps state while it looks, and pictures are looked at by several threads
    cascade = cv2.CascadeClassifier(haarcascades + "haarcascade_frontalface_alt2.xml")
    side = round(_SMALLEST * max(small.size))
    found = cascade.detectMultiScale(np.asarray(small), _STEP, _NEIGHBOURS, minSize=(side, side))
    if len(found) == 0:
        return None
    left, top, width, height = (int(number) for number in max(found, key=lambda box: box[2] * box[3]))
    across, down = size.width / small.width, size.height / small.height
    return (
        round((left + width / 2) * across),
        round((top + height / 2) * down),
        round(width * across),
        round(height * down),
    )
