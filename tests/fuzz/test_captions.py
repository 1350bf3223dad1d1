"""Captions with wildcards, tags and marks: any text, any settings; the same seed gives the same caption."""

from hypothesis import example, given
from hypothesis import strategies as st

from bench.fuzz_targets import make_captions, settings_by
from tests.fuzz.vocabulary import examples, within_limits

PIECES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["{", "}", "{{", "}}", "|", "{a|b}", "|||", ";;;", ",", " ", "\n"]
)


@given(pieces=st.lists(PIECES, max_size=30), number=st.integers(0, 255))
@example(["{a|{b|{c"] * 500 + ["}}}"] * 500, 1)
@example(["{"] * 20_000, 1)
@example(["{a|b|c|d}"] * 3_000, 1)
@example(["tag,"] * 50_000, 0b100010)
@examples(80)
def test_any_text(pieces, number):
    within_limits(lambda: make_captions("".join(pieces).split("\n"), settings_by(number), seed=number))
