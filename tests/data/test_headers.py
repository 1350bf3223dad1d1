"""Quick looks at files: size, orientation, completeness; always in agreement with what decoding says."""

import struct
import time
import timeit
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from library.data import headers
from library.data.formats import PLUGINS
from library.data.headers import MOST_PIXELS, orientation_of, read_header
from library.data.images import decode_problem, open_picture, peek
from library.records import Resolution
from tests.picture_files import encoded, exif, gradient, png, png_chunk

CUT = "the file ends too early"
KINDS = {
    "png": ("PNG", {}),
    "jpeg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "gif": ("GIF", {}),
    "avif": ("AVIF", {}),
    "jxl": ("JXL", {}),
}


def file_of(name, size=(120, 70), **more):
    kind, options = KINDS[name]
    for plugin in PLUGINS.values():
        if plugin.kind == kind and plugin.is_needed:
            pytest.importorskip(plugin.module)
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    return encoded(Image.fromarray(noise), kind, **options, **more)


def by_pillow(data):
    """The upright size as Pillow finds it."""
    with Image.open(BytesIO(data)) as file:
        file.load()
        return Resolution(*ImageOps.exif_transpose(file).size)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(120, 70), (1, 3), (255, 256)])
def test_a_whole_picture_has_its_size_and_no_problem(name, size):
    data = file_of(name, size)
    assert peek(data) == (Resolution(*size), None)
    assert decode_problem(data) is None


@pytest.mark.parametrize("name", KINDS)
def test_whatever_is_cut_off_is_noticed_without_decoding(name):
    data = file_of(name)
    for length in (16, 30, 60, len(data) // 3, len(data) // 2, len(data) - 300, len(data) - 2):
        problem = peek(data[:length])[1]
        if name == "jxl":  # a bare stream of bits, which only its decoder can follow
            assert problem
        else:
            assert problem == CUT, length
        assert decode_problem(data[:length]) == problem


@pytest.mark.parametrize("name", ["png", "jpeg", "webp", "bmp", "gif"])
def test_bytes_behind_the_end_do_no_harm(name):
    assert peek(file_of(name) + bytes(1000)) == (Resolution(120, 70), None)


def test_a_jpeg_cut_after_its_thumbnail_is_cut():
    thumbnail = encoded(gradient(16, 16), "JPEG")
    data = encoded(gradient(64, 64), "JPEG", exif=exif(1) + thumbnail)
    assert data.count(b"\xff\xd9") == 2
    assert peek(data[:-2])[1] == CUT and peek(data[: data.index(b"\xff\xd9") + 2])[1] == CUT


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "the file is empty"),
        (b"hello", "not a picture, or of an unknown kind"),
        (b"<svg xmlns=", "not a picture, or of an unknown kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture, or of an unknown kind"),
        (b"\x00" * 5000, "not a picture, or of an unknown kind"),
        (b"\xff\xd8\xff\xe0", CUT),
        (b"\x89PNG\r\n\x1a\n", CUT),
        (b"GIF89a", CUT),
        (b"BM", CUT),
        (b"RIFF\x00\x00\x00\x00WEBP", CUT),
        (png(0, 5, 8, 2, b""), "the picture is damaged: its size is 0x5"),
        (b"\xff\xd8\xff\xd9", "the picture is damaged: it has no pixels"),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "the picture is damaged: it has no frame"),
    ],
)
def test_what_is_no_picture_is_said_so(data, problem):
    assert peek(data)[1] == decode_problem(data) == problem
    with pytest.raises(OSError):
        open_picture(data)


def test_a_picture_that_would_fill_the_memory_is_not_decoded():
    data = png(20_000, 20_000, 8, 2, b"")
    size, problem = peek(data)
    assert size.area > MOST_PIXELS and problem == (
        "20000x20000 are more pixels than can be decoded safely (178 million)"
    )
    assert decode_problem(data) == problem
    with pytest.raises(OSError, match="more pixels"):
        open_picture(data)


def test_damage_inside_a_whole_file_is_found_by_decoding():
    data = bytearray(file_of("png"))
    data[len(data) // 2] ^= 0xFF
    assert peek(bytes(data))[1] is None
    assert decode_problem(bytes(data)).startswith("the picture is damaged: ")


def test_pixels_that_are_missing_in_a_whole_file_are_found_by_decoding():
    data = png(8, 8, 8, 2, bytes(40))
    assert peek(data) == (Resolution(8, 8), None) and decode_problem(data) == CUT


@given(st.sampled_from(["png", "jpeg", "webp", "bmp", "gif"]), st.binary(max_size=60), st.integers(0, 200), st.data())
def test_no_bytes_make_a_look_fail(name, noise, place, data):
    whole = _CACHE.setdefault(name, file_of(name, (8, 8)))
    broken = whole[:place] + noise + whole[place + data.draw(st.integers(0, 40)) :]
    size, problem = peek(broken)
    assert problem is None or (problem and "\n" not in problem)
    assert min(size) > 0 or problem
    found = decode_problem(broken)
    assert found is None or "\n" not in found
    if problem is not None:
        assert found == problem


_CACHE: dict[str, bytes] = {}


@given(st.integers(0, 10), st.sampled_from("<>"), st.sampled_from([3, 4]), st.integers(0, 5), st.binary(max_size=4))
def test_orientation_is_what_pillow_reads(orientation, order, form, extra, tail):
    block = exif(orientation, order, form, extra=extra)
    expected = Image.Exif()
    expected.load(block)
    value = expected.get(0x0112, 1)
    assert orientation_of(block + tail) == (value if 1 <= value <= 8 else 1)


@given(st.binary(max_size=80))
def test_broken_exif_is_upright(noise):
    assert 1 <= orientation_of(b"Exif\x00\x00" + noise) <= 8
    assert 1 <= orientation_of(b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + noise) <= 8
    assert orientation_of(b"") == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["png", "jpeg", "webp", "lossless webp", "avif"])
def test_a_look_and_a_decode_agree_on_which_way_is_up(name, orientation):
    block = exif(orientation)[6 if name == "avif" else 0 :]
    data = file_of(name, exif=block)
    assert peek(data)[0] == open_picture(data).size == by_pillow(data)


def xmp(orientation):
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def raw_profile(orientation):
    block = exif(orientation)
    digits = block.hex()
    lines = "\n".join(digits[place : place + 72] for place in range(0, len(digits), 72))
    return f"\nexif\n{len(block):8d}\n{lines}\n".encode()


def with_chunks(*chunks):
    whole = encoded(gradient(40, 20), "PNG")
    header_end = 8 + 25
    return whole[:header_end] + b"".join(png_chunk(*chunk) for chunk in chunks) + whole[header_end:]


@pytest.mark.parametrize(
    "data",
    [
        encoded(gradient(40, 20), "JPEG", xmp=xmp(6)),
        encoded(gradient(40, 20), "WEBP", xmp=xmp(8)),
        with_chunks((b"eXIf", exif(6)[6:])),
        with_chunks((b"zTXt", b"Raw profile type exif\x00\x00" + zlib.compress(raw_profile(5)))),
        with_chunks((b"tEXt", b"Raw profile type exif\x00" + raw_profile(7))),
        with_chunks((b"iTXt", b"XML:com.adobe.xmp\x00\x00\x00\x00\x00" + xmp(6))),
        with_chunks((b"iTXt", b"XML:com.adobe.xmp\x00\x01\x00\x00\x00" + zlib.compress(xmp(6)))),
        encoded(gradient(40, 20), "PNG")[:-12] + png_chunk(b"eXIf", exif(6)[6:]) + png_chunk(b"IEND", b""),
    ],
)
def test_the_other_places_where_orientation_is_kept(data):
    assert peek(data) == (Resolution(20, 40), None)
    assert open_picture(data).size == by_pillow(data) == (20, 40)


def test_exif_goes_before_xmp():
    data = encoded(gradient(40, 20), "JPEG", exif=exif(1), xmp=xmp(6))
    assert peek(data)[0] == open_picture(data).size == by_pillow(data) == (40, 20)


def test_a_bmp_may_be_upside_down_or_claim_nonsense():
    data = bytearray(encoded(gradient(7, 5), "BMP"))
    assert struct.unpack_from("<I", data, 2)[0] == len(data)
    struct.pack_into("<I", data, 2, 10 * len(data))
    struct.pack_into("<i", data, 22, -5)
    assert peek(bytes(data)) == (Resolution(7, 5), None)
    assert np.array_equal(np.asarray(open_picture(bytes(data)))[::-1], np.asarray(gradient(7, 5)))


def test_a_jpeg_may_have_fill_bytes_between_its_segments():
    data = encoded(gradient(40, 20), "JPEG", exif=exif(6))
    start = data.index(b"\xff\xe1")
    filled = data[:start] + b"\xff\xff\xff" + data[start:]
    assert peek(filled) == (Resolution(20, 40), None) and open_picture(filled).size == by_pillow(filled) == (20, 40)


@pytest.mark.parametrize("length", [1, 2])
def test_a_webp_chunk_of_odd_length_is_padded(length):
    data = encoded(gradient(40, 20), "WEBP", exif=exif(6))
    chunk = b"OTHR" + struct.pack("<I", length) + bytes(2)
    place = data.index(b"EXIF")
    data = data[:4] + struct.pack("<I", len(data) - 8 + len(chunk)) + data[8:place] + chunk + data[place:]
    assert peek(data) == (Resolution(20, 40), None)


def gif(screen, frame, *, local_table=False):
    """A GIF of one frame of zeros; ``frame`` is left, top, width, height."""
    table = bytes(3 * 128) if local_table else b""
    flags = 0x86 if local_table else 0
    whole = encoded(Image.new("L", frame[2:]), "GIF")
    blocks = whole[whole.index(struct.pack("<HH", *frame[2:]), 13) + 5 :]  # behind the frame's size and flags
    header = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return header + b"," + struct.pack("<4HB", *frame, flags) + table + blocks


@pytest.mark.parametrize("local_table", [False, True])
@pytest.mark.parametrize(("frame", "size"), [((0, 0, 20, 10), (20, 10)), ((4, 6, 20, 10), (24, 16))])
def test_a_gif_holds_its_first_frame(frame, size, local_table):
    data = gif((20, 10), frame, local_table=local_table)
    assert peek(data) == (Resolution(*size), None)
    assert open_picture(data).size == by_pillow(data) == size
    assert peek(data[:-3])[1] == CUT


def test_a_box_that_is_too_short_for_its_own_length_is_damage():
    data = b"\x00\x00\x00\x14ftypavif\x00\x00\x00\x00avif" + b"\x00\x00\x00\x03meta"
    assert peek(data)[1] == "the picture is damaged: a box of 3 bytes"


def test_a_gif_whose_later_frames_are_cut_off_is_whole_enough():
    frames = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (40, 50), dtype=np.uint8)) for n in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert peek(data[:-900]) == (Resolution(50, 40), None) and decode_problem(data[:-900]) is None
    assert peek(data[:900])[1] == CUT


def test_the_kind_is_that_of_the_content():
    assert read_header(encoded(gradient(8, 8), "WEBP")).kind == "WEBP"
    assert read_header(encoded(gradient(8, 8), "TIFF")).kind is None


@pytest.mark.parametrize("name", ["png", "jpeg"])
def test_a_look_is_quick(name):
    data = file_of(name, (1024, 768), exif=exif(6, extra=12))
    assert len(data) > 300_000
    assert min(timeit.repeat(lambda: peek(data), number=20, repeat=5)) / 20 < 400e-6  # 20 to 60 when nothing else runs


def test_a_photo_of_a_hundred_megapixels_passes():
    data = png(10_000, 10_000, 8, 0, bytes(10_000 * 10_001))
    assert peek(data) == ((10_000, 10_000), None)
    assert open_picture(data).size == (10_000, 10_000)


def jpeg_with(segments):
    data = file_of("jpeg")
    return data[:2] + segments + data[2:]


PROGRESSIVE = file_of("jpeg", progressive=True)
SCAN = PROGRESSIVE[PROGRESSIVE.index(b"\xff\xda") : -2]
AVIF_START = b"\x00\x00\x00\x10ftypavif\x00\x00\x00\x00"
BOMBS = {
    "a JPEG of fill bytes": (b"\xff\xd8" + b"\xff" * 50_000_000, "too early"),
    "a JPEG of empty segments": (jpeg_with(b"\xff\xe1\x00\x02" * 1_000_001), "more parts"),
    "a JPEG of EXIF": (jpeg_with((b"\xff\xe1\xff\xff" + b"Exif\x00\x00" + bytes(65527)) * 600), "more metadata"),
    "a JPEG that is drawn again and again": (PROGRESSIVE[:-2] + SCAN * 100 + b"\xff\xd9", "goes over its pixels"),
    "a PNG of empty chunks": (with_chunks(*[(b"abCd", b"")] * 1_000_001), "more parts"),
    "an AVIF of empty boxes": (AVIF_START + b"\x00\x00\x00\x08free" * 1_000_001, "more parts"),
}


@pytest.mark.parametrize(("data", "problem"), BOMBS.values(), ids=BOMBS)
def test_a_file_that_would_take_for_ever_is_damaged(data, problem):
    started = time.process_time()
    assert problem in peek(data)[1] and problem in decode_problem(data)
    assert time.process_time() - started < 30


def test_usual_progressive_jpegs_pass():
    assert peek(PROGRESSIVE)[1] is None and open_picture(PROGRESSIVE).size == (120, 70)


def test_few_packed_texts_of_a_png_are_unpacked(monkeypatch):
    unpacked = []
    whole = zlib.decompressobj

    def counted():
        unpacked.append(1)
        return whole()

    monkeypatch.setattr(headers.zlib, "decompressobj", counted)
    text = b"zTXt", b"Raw profile type exif\x00\x00" + zlib.compress(bytes(1000))
    assert peek(with_chunks(*[text] * 50))[1] is None
    assert len(unpacked) == 4
