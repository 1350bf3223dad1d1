import subprocess
import sys
import timeit

import pytest

from library.data import formats
from library.data.formats import PLUGINS, kind_of, picture_extensions, unreadable_extensions
from tests.picture_files import encoded, gradient

ALWAYS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


@pytest.fixture
def with_modules(monkeypatch):
    """Says which modules are installed."""

    def install(*names):
        monkeypatch.setattr(formats, "find_spec", lambda name: name if name in names else None)

    return install


def test_kinds_that_always_work():
    assert set(picture_extensions()) >= ALWAYS
    assert not set(unreadable_extensions()) & set(picture_extensions())
    assert ALWAYS | set(PLUGINS) == {*picture_extensions(), *unreadable_extensions()}


def test_kinds_that_need_something_installed(with_modules):
    with_modules()
    assert set(picture_extensions()) == ALWAYS
    assert unreadable_extensions() == {".avif": "pillow-avif-plugin", ".jxl": "pillow-jxl-plugin"}
    with_modules("PIL._avif")
    assert ".avif" in picture_extensions() and set(unreadable_extensions()) == {".jxl"}
    with_modules("pillow_avif", "pillow_jxl")
    assert {".avif", ".jxl"} <= set(picture_extensions()) and unreadable_extensions() == {}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_the_first_bytes_tell_the_kind(kind):
    assert kind_of(encoded(gradient(8, 8), kind)) == kind


def test_the_first_bytes_of_other_files():
    assert kind_of(b"\x00\x00\x00\x20ftypavif\x00\x00\x00\x00avifmif1") == "AVIF"
    assert kind_of(b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1avifmiaf") == "AVIF"
    assert kind_of(b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1heicmiaf") is None
    assert kind_of(b"\xff\x0a\x00") == kind_of(b"\x00\x00\x00\x0cJXL \r\n\x87\n\x00") == "JXL"
    assert kind_of(b"") is None and kind_of(b"RIFF\x00\x00\x00\x00WAVE") is None


def test_asking_is_cheap_and_loads_nothing():
    code = (
        "import sys\n"
        "from library.data.formats import picture_extensions, unreadable_extensions\n"
        "import library.data.faces, library.data.headers\n"
        "picture_extensions(), unreadable_extensions()\n"
        "heavy = {'torch', 'numpy', 'PIL.Image', 'transformers', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert timeit.timeit(picture_extensions, number=20) / 20 < 0.01
