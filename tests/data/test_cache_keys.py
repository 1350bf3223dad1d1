import subprocess
import sys
from dataclasses import dataclass

import pytest

from library.data.buckets import Placement
from library.data.cache_keys import latent_key, mask_key, text_key
from library.data.images import PixelSettings
from library.records import Box, Resolution

PLACEMENT = Placement(Resolution(64, 32), Resolution(64, 40), Box(0, 4, 64, 36))
SIGNATURE = {"vae": "a1b2", "dtype": "torch.bfloat16", "tiling": "off"}


def changed(**changes):
    arguments = {
        "content": "c0ffee",
        "placement": PLACEMENT,
        "flipped": False,
        "settings": PixelSettings(),
        "signature": SIGNATURE,
    }
    return latent_key(**{**arguments, **changes})


def changed_mask(**changes):
    arguments = {"content": "c0ffee", "placement": PLACEMENT, "flipped": False, "alpha": False, "stride": 8}
    return mask_key(**{**arguments, **changes})


@pytest.mark.parametrize(
    "change",
    [
        {"content": "c0ffef"},
        {"placement": PLACEMENT._replace(bucket=Resolution(32, 64))},
        {"placement": PLACEMENT._replace(resized=Resolution(64, 41))},
        {"placement": PLACEMENT._replace(crop=Box(0, 5, 64, 37))},
        {"flipped": True},
        {"settings": PixelSettings(interpolation="lanczos")},
        {"settings": PixelSettings(background="#000000")},
        {"signature": {**SIGNATURE, "vae": "a1b3"}},
        {"signature": {**SIGNATURE, "dtype": "torch.float32"}},
        {"signature": {**SIGNATURE, "tiling": "on"}},
        {"signature": {**SIGNATURE, "new_option": ""}},
        {"signature": {"vae": "a1b2", "dtype": "torch.bfloat16"}},
    ],
    ids=str,
)
def test_latent_key_changes_with_everything_that_shapes_the_result(change):
    assert changed(**change) != changed()


@pytest.mark.parametrize(
    "change",
    [
        {"content": "c0ffef"},
        {"placement": PLACEMENT._replace(crop=Box(0, 5, 64, 37))},
        {"flipped": True},
        {"alpha": True},
        {"stride": 32},
    ],
    ids=str,
)
def test_mask_key_changes_with_everything_that_shapes_the_mask(change):
    assert changed_mask(**change) != changed_mask()


def test_keys_are_canonical():
    assert changed(signature=dict(reversed(SIGNATURE.items()))) == changed()
    assert text_key("a cat", {"a": "1", "b": "2"}) == text_key("a cat", {"b": "2", "a": "1"})


def test_a_key_is_the_same_on_every_machine_and_day():
    # A change of the encoding would throw away every cache that people have: raise it on purpose only.
    assert changed() == "3d4d80ae38eb53181953c6a1d51a93f216508c53"
    assert changed_mask() == "940b8337d14cf5b87996a25156a7ad0619c80d60"
    assert text_key("a cat", {"t5": "beef"}) == "5c3fccd66a33745bc3c21f9f89d2f37c116613f9"


@pytest.mark.parametrize(
    ("caption", "signature"),
    [
        ("a cat ", {"t5": "beef"}),
        ("A cat", {"t5": "beef"}),
        ("", {"t5": "beef"}),
        ("a cat", {"t5": "beee"}),
        ("a cat", {"t5x": "beef"}),
        ("a cat", {"t5": "beef", "max_length": "77"}),
        ("a cat", {}),
    ],
    ids=str,
)
def test_text_key_changes_with_caption_and_signature(caption, signature):
    assert text_key(caption, signature) != text_key("a cat", {"t5": "beef"})


def test_nothing_runs_together():
    # Where one field ends and the next begins matters.
    keys = {
        text_key("a", {"b": "c,d", "e": "f"}),
        text_key("a", {"b": "c", "d,e": "f"}),
        text_key('a","b', {"e": "f"}),
        text_key("a", {"b": 'c","d":"e'}),
        text_key("a", {"b": "c", "d": "e"}),
    }
    assert len(keys) == 5
    assert (
        len({latent_key("x", PLACEMENT, False, PixelSettings(), {}), text_key("x", {}), changed_mask(content="x")}) == 3
    )


def test_any_caption_has_a_key():
    assert len({text_key(caption, {}) for caption in ("\ud800", "\udfff", "é", "e\u0301", "\x00", "猫")}) == 6


def test_a_new_field_of_the_placement_changes_every_key():
    @dataclass(frozen=True)
    class Wider:
        bucket: Resolution
        resized: Resolution
        crop: Box
        kernel: str

    assert changed(placement=Wider(*PLACEMENT, "area")) != changed(placement=Wider(*PLACEMENT, "lanczos"))


def test_a_signature_is_text():
    with pytest.raises(ValueError, match="vae_size is something else"):
        changed(signature={"vae_size": 3})


def test_importing_is_light():
    code = (
        "import sys, library.data.cache_keys, library.config.caching; "
        "print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
