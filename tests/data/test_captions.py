import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.dataset import SubsetConfig
from library.data.captions import caption_for_visit, caption_versions
from library.randomness import python_random


def make(captions, seed=0, *, epoch=0, step=0, max_steps=100, variants=None, visit=0, **settings):
    captions = (captions,) if isinstance(captions, str) else tuple(captions)
    return caption_for_visit(
        captions,
        SubsetConfig(image_dir="x", **settings),
        random.Random(seed),
        epoch=epoch,
        step=step,
        max_steps=max_steps,
        variants=variants,
        visit=visit,
    )


def text(*args, **kwargs):
    caption, dropped = make(*args, **kwargs)
    assert not dropped
    return caption


def test_without_settings_the_caption_stays_as_it_is():
    assert text("a cat,  on a mat {x|y} {{z}}") == "a cat,  on a mat {x|y} {{z}}"


def test_prefix_and_suffix_stand_around_the_caption():
    assert text("cat", caption_prefix="photo of", caption_suffix="outdoors") == "photo of cat outdoors"
    assert text(["one", "two"], 1, caption_prefix="photo of", enable_wildcard=True) in ("photo of one", "photo of two")


def test_only_the_first_line_without_wildcards():
    assert {text(["one", "two"], seed) for seed in range(20)} == {"one"}


def test_wildcards_choose_evenly_among_lines_and_words():
    counts = Counter(text(["a {red|blue} cat", "{{dog}}"], seed, enable_wildcard=True) for seed in range(2000))
    assert set(counts) == {"a red cat", "a blue cat", "{dog}"}
    assert counts["{dog}"] == pytest.approx(1000, abs=100)
    assert counts["a red cat"] == pytest.approx(500, abs=80)


def test_brackets_inside_and_around_wildcards():
    assert {text("{a|{{b}}}", seed, enable_wildcard=True) for seed in range(20)} == {"a", "{b}"}
    assert {text("{{{a|b}}}", seed, enable_wildcard=True) for seed in range(20)} == {"{a}", "{b}"}
    assert text("{} {{a|b}} }} {a|", enable_wildcard=True) == "{} {a|b} } {a|"


def test_a_wildcard_may_choose_nothing():
    assert {text("{|very }big", seed, enable_wildcard=True) for seed in range(20)} == {"big", "very big"}


def test_shuffling_permutes_all_but_the_kept_tags():
    seen = {text("a, b,c , d", seed, shuffle_caption=True, keep_tokens=1) for seed in range(200)}
    assert len(seen) == 6
    assert all(caption.startswith("a, ") and sorted(caption.split(", ")) == list("abcd") for caption in seen)


def test_marks_fix_tags_at_both_ends():
    settings = {"shuffle_caption": True, "keep_tokens_separator": "|||", "keep_tokens": 3}
    seen = {text("h1, h2 ||| a, b ||| t1, t2 ||| t3", seed, **settings) for seed in range(50)}
    assert seen == {"h1, h2, a, b, t1, t2, t3", "h1, h2, b, a, t1, t2, t3"}


def test_marks_do_not_reach_the_text_when_nothing_is_shuffled():
    assert text("h ||| a,b ||| t", keep_tokens_separator="|||") == "h, a, b, t"


def test_another_caption_separator():
    assert text("b; a", 1, caption_separator=";", shuffle_caption=True) in ("b, a", "a, b")


def test_the_secondary_separator_holds_parts_together():
    seen = {text("x;;;y, z", seed, secondary_separator=";;;", shuffle_caption=True) for seed in range(20)}
    assert seen == {"x,y, z", "z, x,y"}
    assert text("x;;;y, z", secondary_separator=";;;") == "x,y, z"


@pytest.mark.parametrize(("step", "count"), [(0, 1), (3, 2), (9, 4), (10, 5), (1000, 5)])
def test_warm_up_lets_in_more_and_more_tags(step, count):
    caption = text("a, b, c, d, e", step=step, token_warmup_step=10, token_warmup_min=1)
    assert caption == ", ".join("abcde"[:count])


def test_warm_up_as_a_fraction_of_all_steps_and_behind_kept_tags():
    settings = {"token_warmup_step": 0.1, "max_steps": 100, "keep_tokens": 2}
    assert text("h, i, a, b, c, d, e", step=3, **settings) == "h, i, a, b"
    assert text("h, i, a, b, c, d, e", step=10, **settings) == "h, i, a, b, c, d, e"
    assert text("a, b", step=0, token_warmup_step=10, token_warmup_min=5) == "a, b"
    assert text("a, b", step=0, token_warmup_step=10, token_warmup_min=0) == ""


def test_tags_are_dropped_at_the_rate_and_kept_ones_never():
    kept = Counter()
    for seed in range(1000):
        kept.update(text("h, a, b ||| t", seed, caption_tag_dropout_rate=0.3, keep_tokens_separator="|||").split(", "))
        kept.update(text("k, c, d", seed, caption_tag_dropout_rate=0.3, keep_tokens=1).split(", "))
    assert kept["h"] == kept["k"] == 1000  # before the mark, and counted
    assert kept["c"] == pytest.approx(700, abs=60) and kept["d"] == pytest.approx(700, abs=60)


def test_dropout_empties_captions_at_the_rate():
    made = [make("cat", seed, caption_dropout_rate=0.25) for seed in range(2000)]
    assert set(made) == {("cat", False), ("", True)}
    assert sum(dropped for _, dropped in made) == pytest.approx(500, abs=80)
    assert make("cat", caption_dropout_rate=1.0) == ("", True)


def test_dropout_by_epoch_counts_from_one_and_depends_on_nothing_else():
    for n in (1, 2, 3):
        dropped = [
            make("cat", seed, epoch=epoch, caption_dropout_every_n_epochs=n)[1] for epoch in range(6) for seed in (0, 1)
        ]
        assert dropped == [(epoch + 1) % n == 0 for epoch in range(6) for _ in (0, 1)]


def test_one_setting_does_not_disturb_the_draws_of_another():
    for seed in range(50):
        caption = "{a|b|c}, d, e, f"
        plain = text(caption, seed, enable_wildcard=True, shuffle_caption=True)
        sometimes = make(caption, seed, enable_wildcard=True, shuffle_caption=True, caption_dropout_rate=0.5)
        assert sometimes in ((plain, False), ("", True))
        kept = text(caption, seed, enable_wildcard=True, shuffle_caption=True, caption_tag_dropout_rate=0.5)
        tags = plain.split(", ")
        assert text("d, e, f", seed, shuffle_caption=True, enable_wildcard=True) == text(
            "d, e, f", seed, shuffle_caption=True
        )
        assert [tag for tag in tags if tag in kept.split(", ")] == [tag for tag in kept.split(", ") if tag]


tags = st.lists(st.text("abcdefgh é", min_size=1, max_size=8).map(str.strip).filter(bool), min_size=0, max_size=6)
settings = st.fixed_dictionaries(
    {
        "shuffle_caption": st.booleans(),
        "keep_tokens": st.integers(0, 4),
        "caption_tag_dropout_rate": st.sampled_from([0.0, 0.5, 1.0]),
        "token_warmup_step": st.sampled_from([0.0, 0.5, 10.0]),
        "token_warmup_min": st.integers(0, 3),
        "enable_wildcard": st.booleans(),
        "caption_prefix": st.sampled_from([None, "p1, p2", "p ||| q"]),
        "caption_suffix": st.sampled_from([None, "s", ";;;s"]),
    }
)


@given(
    parts=st.lists(tags, min_size=1, max_size=4), settings=settings, seed=st.integers(0, 2**32), step=st.integers(0, 30)
)
def test_no_mark_ever_reaches_the_text(parts, settings, seed, step):
    caption = " ||| ".join(";;;".join(part) for part in parts)
    settings |= {"keep_tokens_separator": "|||", "secondary_separator": ";;;"}
    made = text(caption, seed, step=step, **settings)
    assert "|||" not in made and ";;;" not in made


@given(head=tags, free=tags, tail=tags, settings=settings, seed=st.integers(0, 2**32), step=st.integers(0, 30))
def test_fixed_tags_stay_and_free_tags_are_never_invented(head, free, tail, settings, seed, step):
    settings |= {"caption_prefix": None, "caption_suffix": None, "keep_tokens_separator": "|||"}
    caption = "|||".join(",".join(part) for part in (head, free, tail))
    made = [tag for tag in text(caption, seed, step=step, **settings).split(", ") if tag]
    assert made[: len(head)] == head
    assert made[len(made) - len(tail) :] == tail
    middle = Counter(made[len(head) : len(made) - len(tail)])
    assert not middle - Counter(free)
    if settings["caption_tag_dropout_rate"] == 0 and settings["token_warmup_step"] == 0:
        assert middle == Counter(free)


@given(lines=st.lists(st.text(max_size=30), min_size=1, max_size=3), settings=settings, seed=st.integers(0, 2**32))
def test_the_same_seed_makes_the_same_caption(lines, settings, seed):
    assert make(lines, seed, **settings) == make(lines, seed, **settings)


# Versions for cached text

lines_with_marks = st.lists(st.text("ab,{}|; ", max_size=20), min_size=1, max_size=3)
marks = {"keep_tokens_separator": "||", "secondary_separator": ";;"}


@given(
    lines=lines_with_marks,
    settings=settings,
    seed=st.integers(0, 2**32),
    dropout=st.sampled_from([0.0, 0.5]),
    variants=st.integers(1, 5),
    visits=st.lists(st.integers(0, 100), min_size=1, max_size=4),
)
def test_versions_hold_whatever_visits_get(lines, settings, seed, dropout, variants, visits):
    settings |= {"caption_dropout_rate": dropout, "token_warmup_step": 0.0, **marks}
    versions = caption_versions(lines, SubsetConfig(image_dir="x", **settings), variants)
    assert len(set(versions)) == len(versions) <= variants
    for visit in visits:
        caption, dropped = make(lines, seed, variants=variants, visit=visit, **settings)
        assert caption in versions or dropped


@given(lines=lines_with_marks, settings=settings, seed=st.integers(0, 2**32), dropout=st.sampled_from([0.0, 0.5]))
def test_without_variants_versions_are_all_that_can_be(lines, settings, seed, dropout):
    settings |= {"shuffle_caption": False, "caption_tag_dropout_rate": 0.0, "token_warmup_step": 0.0, **marks}
    versions = caption_versions(lines, SubsetConfig(image_dir="x", **settings), None)
    caption, dropped = make(lines, seed, caption_dropout_rate=dropout, **settings)
    assert caption in versions or dropped


@given(lines=lines_with_marks, settings=settings, variants=st.integers(1, 6), dropout=st.sampled_from([0.0, 0.5]))
def test_versions_are_made_as_any_visit_is(lines, settings, variants, dropout):
    # The same pipeline as for captions that aren't cached, dropout apart; only the seed is another.
    settings |= {"token_warmup_step": 0.0, **marks}
    subset = SubsetConfig(image_dir="x", **settings)
    online = [
        caption_for_visit(
            lines, subset, python_random("caption variant", *lines, number), epoch=0, step=0, max_steps=1
        )[0]
        for number in range(variants)
    ]
    assert caption_versions(lines, subset, variants) == tuple(dict.fromkeys(online))
    settings |= {"caption_dropout_rate": dropout}
    for visit in range(2 * variants):
        caption, dropped = make(lines, visit, variants=variants, visit=visit, **settings)
        assert caption == ("" if dropped else online[visit % variants])


def test_visits_take_the_versions_in_turn():
    settings = {"shuffle_caption": True, "caption_dropout_rate": 0.4}
    caption = "a, b, c, d, e, f, g, h"
    versions = caption_versions((caption,), SubsetConfig(image_dir="x", **settings), 4)
    made = [make(caption, seed, variants=4, visit=seed, **settings) for seed in range(40)]
    assert {caption for caption, _ in made} == {*versions, ""} and len(versions) == 4
    assert all(caption == versions[number % 4] for number, (caption, dropped) in enumerate(made) if not dropped)
    # dropout is each visit's own, and the one that captions without versions have
    assert [dropped for _, dropped in made] == [make(caption, seed, **settings)[1] for seed in range(40)]
    assert 5 < sum(dropped for _, dropped in made) < 30


def test_more_variants_keep_the_versions_there_are():
    subset = SubsetConfig(image_dir="x", shuffle_caption=True, enable_wildcard=True, caption_tag_dropout_rate=0.1)
    lines = ("a, b, c, d", "{e|f}, g, h, i, j")
    few, many = caption_versions(lines, subset, 5), caption_versions(lines, subset, 20)
    assert many[: len(few)] == few and len(many) > 10


def test_versions_of_captions_that_do_not_change():
    assert caption_versions(["{a|b}", "c"], SubsetConfig(image_dir="x"), 8) == ("{a|b}",)
    marked = SubsetConfig(image_dir="x", caption_prefix="p", keep_tokens_separator="|||", caption_dropout_rate=0.5)
    assert caption_versions(["a ||| b,c"], marked, None) == ("p a, b, c",)
    assert caption_versions(["a {{b}}"], SubsetConfig(image_dir="x", enable_wildcard=True), 8) == ("a {b}",)


def test_versions_without_variants():
    subset = SubsetConfig(image_dir="x", enable_wildcard=True)
    assert caption_versions(["{a|b} {c|d}", "{{e}}"], subset, None) == ("a c", "a d", "b c", "b d", "{e}")
    assert len(caption_versions(["{a|b|c|d|e|f|g|h|i|j}" * 9], subset, None)) == 10_000
    for change in ({"shuffle_caption": True}, {"caption_tag_dropout_rate": 0.1}, {"token_warmup_step": 2.0}):
        with pytest.raises(ValueError, match="can't be listed without a number of variants"):
            caption_versions(["a, b"], SubsetConfig(image_dir="x", **change), None)


def test_versions_of_a_warm_up_are_complete():
    subset = SubsetConfig(image_dir="x", token_warmup_step=50.0)
    assert caption_versions(["a, b, c"], subset, 3) == ("a, b, c",)
