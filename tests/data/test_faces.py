import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from library.config.errors import ConfigError
from library.data.faces import face_in_name, find_face
from tests.picture_files import encoded, exif, gradient

PHOTOS = Path(__file__).parents[2] / "examples" / "data" / "photos"
FACE = (224, 114, 100, 100)
"""Of the astronaut, looked up by eye: centre and size."""


@pytest.fixture
def opencv():
    module = pytest.importorskip("cv2")
    if not hasattr(module, "CascadeClassifier"):
        pytest.skip("needs OpenCV 4")


def astronaut():
    return Image.open(BytesIO((PHOTOS / "astronaut.png").read_bytes())).convert("RGB")


def near(found, expected, tolerance):
    return found is not None and all(abs(one - other) <= tolerance for one, other in zip(found, expected))


@pytest.mark.parametrize(
    ("path", "face"),
    [
        ("portrait_512_300_180_200.png", (512, 300, 180, 200)),
        ("a/b_1_2_3_4/c.png", None),
        ("s3://bucket/a_b_10_20_30_40.jpg", (10, 20, 30, 40)),
        ("_1_2_3_4.png", (1, 2, 3, 4)),
        ("a_1_2_3.png", None),
        ("a_1_2_3_4_.png", None),
        ("a_1_2_3_4_5.png", (2, 3, 4, 5)),
        ("a_1_2_0_4.png", None),
        ("a_1_2_3_x.png", None),
    ],
)
def test_a_name_that_ends_in_four_numbers_gives_a_face(path, face):
    assert face_in_name(path) == face


def test_a_face_is_found(opencv):
    found = find_face(encoded(astronaut(), "PNG"))
    assert near(found, FACE, 15)
    assert all(type(number) is int for number in found)


@pytest.mark.parametrize("scale", [0.6, 3])
def test_a_face_is_given_in_pixels_of_the_picture(opencv, scale):
    picture = astronaut()
    large = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    assert near(find_face(encoded(large, "JPEG", quality=95)), [scale * number for number in FACE], 15 * scale)


def test_a_face_is_found_in_the_upright_picture(opencv):
    lying = astronaut().transpose(Image.Transpose.ROTATE_90)
    assert near(find_face(encoded(lying, "PNG", exif=exif(6))), FACE, 15)


def test_the_largest_of_several_faces_is_taken(opencv):
    canvas = Image.new("RGB", (1100, 520), (120, 120, 120))
    canvas.paste(astronaut().resize((300, 300)), (0, 100))
    canvas.paste(astronaut(), (560, 0))
    found = find_face(encoded(canvas, "PNG"))
    assert near(found, (560 + FACE[0], FACE[1], *FACE[2:]), 20)


@pytest.mark.parametrize("name", ["coffee.png", "china.jpg", "rocket.jpg", "flower.jpg"])
def test_pictures_without_a_face_have_none(opencv, name):
    assert find_face((PHOTOS / name).read_bytes()) is None


def test_without_opencv_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match="pip install 'opencv-python-headless<5'"):
        find_face(encoded(gradient(64, 64), "PNG"))
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(__version__="5.0.0"))
    with pytest.raises(ConfigError, match=r"OpenCV 5\.0\.0 can't find faces; .*opencv-python-headless<5"):
        find_face(encoded(gradient(64, 64), "PNG"))


def test_a_broken_picture_is_an_os_error(opencv):
    with pytest.raises(OSError, match="the file ends too early"):
        find_face((PHOTOS / "coffee.png").read_bytes()[:4000])
