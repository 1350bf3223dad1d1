import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.findings import Findings
from library.data.selection import balance, for_training, held_out_contents, hold_out
from library.records import Resolution, Sample


def sample(content, *, dataset=0, subset=0, **options):
    return Sample(
        f"{dataset}/{subset}/{content}", content, content, ("",), Resolution(1, 1), dataset, subset, **options
    )


def dataset(*splits, **settings):
    subsets = tuple(SubsetConfig(image_dir=f"folder{n}", validation_split=split) for n, split in enumerate(splits))
    return DatasetConfig(resolution=Resolution(64, 64), subsets=subsets, **settings)


def keys(samples):
    return [sample.key for sample in samples]


def reg_samples(count, repeats=1):
    return [sample(str(number), subset=1, num_repeats=repeats, is_reg=True) for number in range(count)]


contents = st.lists(st.text("0123456789abcdef", min_size=4, max_size=8), unique=True, max_size=60)
fractions = st.floats(0.02, 0.98)


@pytest.mark.parametrize(
    ("visits", "count", "repeats", "expected"),
    [
        (5, 3, 1, [2, 2, 1]),
        (10, 3, 1, [4, 3, 3]),
        (5, 12, 1, [1] * 5),
        (5, 12, 3, [3, 3]),
        (0, 3, 1, []),
        (4, 2, 5, [5]),
    ],
)
def test_regularisation_pictures_are_balanced_as_kohya_does(visits, count, repeats, expected):
    assert [sample.num_repeats for sample in balance(reg_samples(count, repeats), visits)] == expected


@given(visits=st.integers(0, 60), count=st.integers(1, 20), repeats=st.integers(1, 5))
def test_balanced_visits_reach_the_others_and_overshoot_by_less_than_one_picture(visits, count, repeats):
    total = sum(sample.num_repeats for sample in balance(reg_samples(count, repeats), visits))
    assert visits <= total < visits + repeats or total == visits == 0


def by_itself(content, fraction, seed):
    """Whether a content is held out among pictures of which some are and some are not."""
    company = {f"other {number}" for number in range(1000)}
    chosen = held_out_contents(company | {content}, fraction, seed)
    assert 0 < len(chosen & company) < len(company)
    return content in chosen


@settings(deadline=None, max_examples=30)
@given(pictures=contents, fraction=fractions, seed=st.integers(0, 2**40))
def test_the_other_pictures_do_not_matter(pictures, fraction, seed):
    chosen = held_out_contents(pictures, fraction, seed)
    expected = {content for content in pictures if by_itself(content, fraction, seed)}
    if 0 < len(expected) < len(pictures) or not pictures:
        assert chosen == expected
    else:  # one is moved, so that neither side is empty
        assert len(chosen ^ expected) == (1 if len(pictures) > 1 else len(expected))
    assert held_out_contents(pictures[::-1], fraction, seed) == chosen


@given(pictures=contents, fraction=st.floats(0.01, 1), seed=st.integers(0, 2**40))
def test_neither_side_is_empty_while_there_are_two_contents(pictures, fraction, seed):
    chosen = held_out_contents(pictures, fraction, seed)
    assert chosen <= set(pictures)
    if fraction == 1:
        assert chosen == set(pictures)
    elif len(pictures) > 1:
        assert 0 < len(chosen) < len(pictures)
    else:
        assert not chosen


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.8])
def test_the_share_is_about_the_fraction(fraction):
    chosen = held_out_contents((f"{number:040x}" for number in range(10_000)), fraction, 3)
    assert len(chosen) == pytest.approx(10_000 * fraction, rel=0.1)


def test_the_choice_depends_on_the_seed():
    pictures = [f"{number:040x}" for number in range(100)]
    assert held_out_contents(pictures, 0.3, 1) != held_out_contents(pictures, 0.3, 2)
    found = [sample(content) for content in pictures]
    by_default = hold_out([dataset(0.3)], found, 1, Findings())
    assert by_default == hold_out([dataset(0.3, validation_seed=1)], found, 5, Findings())
    assert by_default != hold_out([dataset(0.3, validation_seed=2)], found, 1, Findings())


@given(
    pictures=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 30)), min_size=1, max_size=60),
    splits=st.lists(st.sampled_from([0, 0.2, 0.7]), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_no_content_is_both_trained_on_and_held_out(pictures, splits, seed):
    places = sorted(set(pictures))
    found = [sample(str(content), dataset=number, subset=position) for number, position, content in places]
    datasets = [dataset(*splits[:2]), dataset(*splits[2:])]
    findings = Findings()
    validation = hold_out(datasets, found, seed, findings)
    training = for_training(datasets, found, validation, findings)
    assert not {sample.content for sample in validation} & {sample.content for sample in training}
    assert keys(training) == [key for key in keys(found) if key in set(keys(training))]
    if not findings.problems and not any("not trained on" in note for note in findings.notes):
        assert len(validation) + len(training) == len(found)


def test_subsets_have_their_own_split_and_regularisation_is_never_held_out():
    subsets = [
        SubsetConfig(image_dir="a", validation_split=0.5),
        SubsetConfig(image_dir="b"),
        SubsetConfig(image_dir="c", validation_split=0.5, is_reg=True),
        SubsetConfig(image_dir="d", validation_split=0.5, is_regularisation_data=True),
    ]
    config = DatasetConfig(resolution=Resolution(64, 64), subsets=tuple(subsets))
    found = [
        sample(f"{position}-{n}", subset=position, is_reg=position == 2) for position in range(4) for n in range(9)
    ]
    findings = Findings()
    chosen = hold_out([config], found, 0, findings)
    assert {sample.subset for sample in chosen} == {0} and 0 < len(chosen) < 9
    assert findings.notes == [f"datasets[0]: {len(chosen)} of 18 pictures held out for validation"]


def test_a_dataset_for_validation_is_held_out_whole_and_its_pictures_are_visited_once():
    datasets = [dataset(0), dataset(0.5, role="validation")]
    found = [sample(f"a{n}") for n in range(4)]
    found += [sample(content, dataset=1, num_repeats=3) for content in ("a1", "b0", "b1")]
    findings = Findings()
    validation = hold_out(datasets, found, 0, findings)
    assert validation == [sample._replace(num_repeats=1) for sample in found[4:]]
    assert keys(for_training(datasets, found, validation, findings)) == ["0/0/a0", "0/0/a2", "0/0/a3"]
    assert findings.notes == [
        "datasets[1]: 3 of 3 pictures held out for validation",
        "1 picture not trained on: the same content is held out for validation",
    ]
    assert not findings.problems


def test_a_subset_whose_pictures_are_all_held_out_elsewhere_is_a_problem():
    datasets = [dataset(0, 0), dataset(0, role="validation")]
    found = [sample("a"), sample("b", subset=1), sample("b", dataset=1)]
    findings = Findings()
    for_training(datasets, found, hold_out(datasets, found, 0, findings), findings)
    assert findings.problems == [
        "folder1: none of 1 picture is left to train on in datasets[0]: the same content is held out for validation "
        "elsewhere"
    ]
    findings = Findings()
    found = [found[0], sample("a", dataset=1)]
    for_training(datasets, found, hold_out(datasets, found, 0, findings), findings)
    assert findings.problems == [
        'every picture is held out for validation; the dataset with role = "validation" needs others'
    ]


def test_a_subset_that_is_held_out_whole_on_purpose_is_none():
    datasets = [dataset(0, 1.0)]
    found = [sample("a"), sample("b", subset=1)]
    findings = Findings()
    validation = hold_out(datasets, found, 0, findings)
    assert keys(validation) == ["0/1/b"] and keys(for_training(datasets, found, validation, findings)) == ["0/0/a"]
    assert not findings.problems


def test_regularisation_counts_against_what_the_others_visit_in_an_epoch():
    subsets = (
        SubsetConfig(image_dir="reg", is_reg=True),
        SubsetConfig(image_dir="cats", num_repeats=2, probability=0.5),
        SubsetConfig(image_dir="dogs"),
    )
    config = DatasetConfig(resolution=Resolution(64, 64), subsets=subsets)
    found = [sample(f"r{n}", is_reg=True) for n in range(3)]
    found += [sample(f"c{n}", subset=1, num_repeats=2) for n in range(6)] + [sample("d", subset=2)]
    findings = Findings()
    training = for_training([config], found, [], findings)
    assert [sample.num_repeats for sample in training[:3]] == [3, 2, 2]
    assert keys(training) == keys(found)
    assert findings.notes == ["datasets[0]: 3 of 3 regularisation pictures used, 7 visits against 7 of the others"]


def test_a_set_smaller_than_a_batch_is_noted():
    findings = Findings()
    for_training([dataset(0, batch_size=4)], [sample("a"), sample("b")], [], findings)
    assert findings.notes == ["datasets[0]: 2 visits per epoch, less than batch_size 4"]
