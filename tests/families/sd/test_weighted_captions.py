import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.families.sd.weighted_captions import DOWN, UP, weighted_pieces


@pytest.mark.parametrize(
    ("caption", "pieces"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (cat:1.3), sitting", [("a ", 1.0), ("cat", 1.3), (", sitting", 1.0)]),
        ("(a)", [("a", UP)]),
        ("((a))", [("a", UP * UP)]),
        ("[a]", [("a", DOWN)]),
        ("(a [b] c:2)", [("a ", 2.0), ("b", 2.0 * DOWN), (" c", 2.0)]),
        (r"\(a\) \[b\] \\", [("(a) [b] \\", 1.0)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("a: b, 3:2 (c)", [("a: b, 3:2 ", 1.0), ("c", UP)]),
        ("(a", [("a", UP)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("a:1.2)", [("a:1.2)", 1.0)]),
        ("(a]", [("a]", UP)]),
        ("", []),
        ("()", []),
    ],
)
def test_brackets_become_weights(caption, pieces):
    found = weighted_pieces(caption)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@given(st.text("ab ()[]:\\1.-", max_size=30))
def test_nothing_but_brackets_numbers_and_backslashes_is_lost(caption):
    kept = "".join(text for text, _ in weighted_pieces(caption))
    assert sum(kept.count(sign) for sign in "ab") == sum(caption.count(sign) for sign in "ab")


@given(st.text("ab ,:.1", max_size=30))
def test_a_caption_without_brackets_stays(caption):
    assert "".join(text for text, _ in weighted_pieces(caption)) == caption
