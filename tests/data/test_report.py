import dataclasses

import pytest

from library.data.file_index import FileIndex
from library.data.findings import Skipped
from library.data.report_captions import find_cuts, whole_captions
from library.data.report_lines import amount, report_lines
from library.data.report_remarks import MOST_DETAILS, other_notes, what_is_lost
from library.records import Resolution
from tests.data.report_setting import SMALL, SQUARE, WIDE, dataset, kinds, only, report, run, samples, subset

GIB = 2**30


class Window:
    """Reads so many characters of a caption."""

    def __init__(self, characters, *, length=7, name="w"):
        self.characters, self.length, self.name = characters, length, name
        self.asked = []

    def may_cut(self, caption):
        return len(caption) > 5

    def seen(self, captions):
        self.asked += captions
        return [min(len(caption), self.characters) for caption in captions]

    def window_identity(self):
        return f"{self.name}:{self.characters}"


# numbers


def test_pictures_visits_and_batches_of_each_bucket():
    found = samples(SQUARE, SQUARE, SQUARE, WIDE, num_repeats=3)
    (facts,) = report(run(dataset()), found).datasets
    rows = [(str(bucket.size), *dataclasses.astuple(bucket)[1:]) for bucket in facts.buckets]
    assert rows == [("64x64", 3, 9, 5, 1), ("128x32", 1, 3, 2, 1)]
    assert (facts.pictures, facts.visits, facts.batches, facts.short) == (4, 12, 7, 2)


def test_buckets_go_from_upright_to_wide():
    found = samples(Resolution(32, 128), WIDE, SQUARE)
    (facts,) = report(run(dataset()), found).datasets
    assert [str(bucket.size) for bucket in facts.buckets] == ["32x128", "64x64", "128x32"]


def test_how_much_is_enlarged_and_cut_away():
    found = samples(Resolution(32, 32), Resolution(48, 48), SQUARE, Resolution(128, 64), Resolution(640, 640))
    (facts,) = report(run(dataset(enable_bucket=False)), found).datasets
    assert (facts.enlarged, facts.enlargement, facts.cut_away) == (2, 2.0, 0.5)


def test_masks_captions_and_regularisation_are_counted():
    kind = dataset(subset(alpha_mask=True), subset(is_reg=True), subset(is_regularisation_data=True))
    found = (
        *samples(SQUARE, captions=("",)),
        *samples(SQUARE, position=1, is_reg=True, captions=("", "x")),
        *samples(SQUARE, SQUARE, position=2, mask="mask.png"),
    )
    (facts,) = report(run(kind), found).datasets
    assert (facts.masks, facts.captionless, facts.regularisation) == (3, 1, 3)


def test_a_dataset_for_validation_shows_its_buckets_without_visits():
    config = run(dataset(), dataset(role="validation"))
    held_out = (*samples(SQUARE, start=5), *samples(WIDE, SQUARE, number=1))
    trained, measured = report(config, samples(SQUARE), validation=held_out).datasets
    assert (trained.pictures, trained.held_out, trained.buckets[0].pictures, len(trained.buckets)) == (1, 1, 1, 1)
    assert (measured.pictures, measured.held_out, measured.visits) == (0, 2, 0)
    assert [(str(bucket.size), bucket.pictures) for bucket in measured.buckets] == [("64x64", 1), ("128x32", 1)]


def test_steps_and_epochs():
    steps = report(run(dataset(), max_train_epochs=3), samples(SQUARE, SQUARE, SQUARE)).steps
    assert (steps.total, steps.first_epoch, steps.epochs) == (6, 2, 3.0)
    steps = report(run(dataset(), max_train_steps=5), samples(SQUARE, SQUARE, SQUARE)).steps
    assert (steps.total, steps.epochs) == (5, 2.5)
    steps = report(run(dataset()), samples(*[SQUARE] * 8), micro_batches_per_step=3).steps
    assert steps.first_epoch == 2


def test_epochs_of_different_length_are_counted_as_they_come():
    config = run(dataset(subset(), subset(start_epoch=2)), max_train_epochs=2)
    made = report(config, (*samples(SQUARE, SQUARE), *samples(*[SQUARE] * 4, position=1)))
    assert (made.steps.total, made.steps.first_epoch, made.steps.varies) == (4, 1, True)
    assert made.datasets[0].visits == 2
    assert "2 visits in the first epoch" in "\n".join(report_lines(made))


def test_steps_without_pictures_are_remarked():
    made = report(run(dataset(subset(start_step=3))), samples(SQUARE))
    assert kinds(made)[0] == "idle steps" and "in steps 1 to 2" in made.remarks[0].text
    assert made.datasets[0].visits == 0


# captions


def test_encoders_that_cut_the_same_are_told_together_with_what_is_lost():
    windows = {"A": Window(9), "B": Window(9, name="v"), "C": Window(99)}
    found = (*samples(SQUARE, captions=("a red cat on a mat",)), *samples(SQUARE, start=1, captions=("short",)))
    made = report(run(dataset()), found, windows=windows)
    remark = only(made, "caption cut")
    assert remark.text == "1 caption is longer than the 7 tokens that A and B read; C can take it"
    assert remark.details == ('pictures/0.png: reads "a red cat", not "on a mat" (8 characters)',)
    assert remark.samples == {"0/0/0.png"} and made.windows == {"A": 7, "B": 7, "C": 7}


def test_encoders_that_cut_elsewhere_are_told_apart():
    windows = {"A": Window(9), "B": Window(12, length=9)}
    made = report(run(dataset()), samples(SQUARE, captions=("a red cat on a mat",)), windows=windows)
    assert [remark.text for remark in made.remarks] == [
        "1 caption is longer than the 7 tokens that A reads",
        "1 caption is longer than the 9 tokens that B reads",
    ]


def test_every_line_and_wildcard_is_looked_at():
    settings = subset(enable_wildcard=True)
    found = samples(SQUARE, captions=("short", "{a|a very long} caption"))
    (cuts,) = find_cuts(found, [dataset(settings)], {"A": Window(12)})
    assert cuts.kept == {"a very long caption": 12} and cuts.samples == {"0/0/0.png": "a very long caption"}


def test_tags_that_are_shuffled_dropped_or_warmed_up_all_count():
    settings = subset(shuffle_caption=True, caption_tag_dropout_rate=0.9, token_warmup_step=9, caption_prefix="so:")
    assert whole_captions(("a, b,c",), settings) == ("so: a, b,c",)


def test_captions_with_very_many_versions_are_sampled():
    wild = " ".join("{a|b|c|d|e|f|g|h|i|j}" for _ in range(6))
    assert 1 < len(whole_captions((wild,), subset(enable_wildcard=True))) <= 16
    assert whole_captions((wild,), subset()) == (wild,)


@pytest.mark.parametrize("stored", [True, False])
def test_a_caption_is_tokenized_once_in_a_lifetime(tmp_path, stored):
    found = (*samples(SQUARE, SQUARE, captions=("a red cat on a mat",)), *samples(SQUARE, start=2, captions=("tiny",)))
    index = FileIndex(tmp_path / "files.sqlite") if stored else None
    first, second = Window(9), Window(9)
    expected = find_cuts(found, [dataset()], {"A": first}, index)
    assert first.asked == ["a red cat on a mat"]
    index = FileIndex(tmp_path / "files.sqlite") if stored else None
    assert find_cuts(found, [dataset()], {"A": second}, index) == expected
    assert second.asked == ([] if stored else first.asked)


def test_progress_counts_captions(monkeypatch):
    told = []
    monkeypatch.setattr("library.data.report_captions._CHUNK", 2)
    found = [samples(SQUARE, start=row, captions=(f"caption {row}",))[0] for row in range(5)]
    find_cuts(found, [dataset()], {"A": Window(3)}, None, lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_what_is_lost_is_shown_at_its_border():
    assert what_is_lost("one two", 4) == 'reads "one", not "two" (3 characters)'
    shown = what_is_lost("a" * 100 + "b" * 100, 100)
    assert shown == f'reads "...{"a" * 36}", not "{"b" * 36}..." (100 characters)'


# remarks


def test_what_is_left_out_is_counted_by_reason_and_dataset():
    skipped = [
        Skipped("small.png", 0, 0, "9x9 has the area of a square of 9, below minimum_image_size 64"),
        Skipped("tiny.png", 0, 1, "8x8 has the area of a square of 8, below minimum_image_size 64"),
        Skipped("bad.png", 0, 0, "the file is empty"),
        Skipped("flat.png", 1, 0, "900x9 has the aspect ratio 100, above maximum_aspect_ratio 3"),
        Skipped("gone.png", 1, 0, "not found"),
    ]
    made = report(run(dataset(), dataset()), samples(SQUARE), skipped=tuple(skipped))
    first, second = made.remarks
    assert first.text == "datasets[0]: 3 pictures left out: 2 by minimum_image_size 64, 1 can't be read"
    assert first.details[0] == "bad.png: the file is empty"
    assert second.text == "datasets[1]: 2 pictures left out: 1 by maximum_aspect_ratio 3, 1 not found"


def test_notes_that_say_the_same_are_dropped():
    skipped = [Skipped("cats/bad.png", 0, 0, "the file is empty")]
    notes = ("1 picture left out that can't be read:", "cats/bad.png: the file is empty", "cats: 1 .xyz not read")
    assert other_notes(notes, skipped) == ("cats: 1 .xyz not read",)


def test_copies_and_look_alikes():
    found = samples(*[SQUARE] * 5)
    paths = [sample.path for sample in found]
    made = report(run(dataset()), found, duplicates=(tuple(paths[:3]),), near_duplicates=((paths[0], paths[3]),))
    assert only(made, "copy").text == "3 pictures have the same content as others: 2 more than needed"
    assert only(made, "copy").details == ("pictures/0.png = pictures/1.png = pictures/2.png",)
    assert only(made, "copy").samples == {"0/0/0.png", "0/0/1.png", "0/0/2.png"}
    assert only(made, "look-alike").details == ("pictures/0.png ~ pictures/3.png",)


def test_pictures_that_are_enlarged_a_lot_are_named_the_worst_first():
    made = report(run(dataset()), samples(Resolution(50, 50), SMALL, Resolution(40, 40), SQUARE))
    remark = only(made, "enlarged")
    assert remark.text.startswith("2 pictures enlarged more than 1.5 times")
    assert remark.details == ("pictures/1.png: 16x16 to 64x64 (4 times)", "pictures/2.png: 40x40 to 64x64 (1.6 times)")


def test_empty_captions():
    found = (*samples(SQUARE, captions=("",)), *samples(SQUARE, start=1))
    remark = only(report(run(dataset()), found), "no caption")
    assert (remark.text, remark.details) == ("1 picture with an empty caption", ("pictures/0.png",))


def test_mostly_short_batches():
    shapes = [Resolution(32, 128), WIDE, SQUARE]
    assert kinds(report(run(dataset()), samples(*shapes))) == ["short batches"]
    assert kinds(report(run(dataset()), samples(*shapes, *shapes))) == []
    assert kinds(report(run(dataset(batch_size=4)), samples(SQUARE))) == []  # one short batch is all there can be


def test_many_pictures_are_not_all_named():
    made = report(run(dataset()), samples(*[SQUARE] * (MOST_DETAILS + 7), captions=("",)))
    remark = only(made, "no caption")
    assert (len(remark.details), remark.more, len(remark.samples)) == (MOST_DETAILS, 7, MOST_DETAILS + 7)
    lines = report_lines(made)
    assert lines[1:7] == [*(f"  pictures/{row}.png" for row in range(5)), f"  and {MOST_DETAILS + 2} more"]


# lines


def test_warnings_come_first_and_numbers_are_aligned():
    found = samples(*[SQUARE] * 3, WIDE, num_repeats=500) + samples(SQUARE, start=4, captions=("",))
    made = report(run(dataset()), found, notes=("cats: something",), windows={"A": Window(99), "B": Window(99)})
    assert report_lines(made) == [
        "warning: 1 picture with an empty caption",
        "  pictures/4.png",
        "note: cats: something",
        "datasets[0]: 5 pictures at 64x64, 2,001 visits per epoch in batches of 2",
        "  bucket  pictures  visits  batches",
        "   64x64         4   1,501      751",
        "  128x32         1     500      250",
        "  1 of 1,001 batches are short",
        "captions: A and B read every one to its end",
        "steps: 10 optimizer steps, 1001 per epoch, 0.00999 epochs; 1 process, 1 micro-batch per step each",
    ]


def test_many_buckets_share_rows_that_fit_a_terminal():
    sizes = [Resolution(width, 512) for width in range(64, 4096, 64)]
    lines = report_lines(report(run(dataset(resolution=Resolution(256, 256), min_bucket_reso=64)), samples(*sizes)))
    start = next(row for row, line in enumerate(lines) if "buckets, with their pictures:" in line)
    rows = [line for line in lines[start + 1 :] if "x" in line and line.startswith("  ")]
    assert 1 < len(rows) < 13 and all(len(row) <= 100 for row in rows)
    assert sum(int(cell.split()[1]) for row in rows for cell in row.strip().split("    ")) == len(sizes)


def test_the_rest_is_one_line():
    config = run(
        dataset(subset(alpha_mask=True), subset(is_reg=True)),
        cache_latents_to_disk=True,
        cache_text_encoder_outputs=True,
        cache_dir="s3://bucket/cache",
    )
    found = samples(Resolution(60, 60), Resolution(64, 96)) + samples(SQUARE, position=1, is_reg=True)
    lines = report_lines(report(config, found, validation=samples(SQUARE, start=9)))
    assert (
        lines[0]
        == "datasets[0]: 3 pictures at 64x64, 3 visits per epoch in batches of 2; 1 more held out for validation"
    )
    assert (
        "  1 of 2 batches are short; 1 enlarged, at most 1.07 times; at most 33% of a picture cropped away; "
        "2 with a mask; 1 for regularisation" in lines
    )
    assert (
        "cache, at most: latents 0.002 MiB, masks 0.00018 MiB, text features 0.0095 MiB; 0.0021 MiB in "
        "s3://bucket/cache and 0.0095 MiB in memory" in lines
    )


def test_no_line_holds_what_a_terminal_or_a_comment_cannot():
    found = samples(SQUARE, captions=("",), path="a\nb\x1b\udcff.png")
    assert report_lines(report(run(dataset()), found))[1] == "  a?b??.png"


@pytest.mark.parametrize(("size", "said"), [(3 * GIB, "3.0 GiB"), (50 * 2**20, "50 MiB"), (2**19, "0.5 MiB")])
def test_amounts(size, said):
    assert amount(size) == said
