import random
import time

from hypothesis import given
from hypothesis import strategies as st

from library.data.duplicates import MOST_DIFFERENT_BITS, look_alikes, same_content
from library.records import Resolution, Sample


def sample(path, content, dataset=0):
    return Sample(f"{dataset}/0/{path}", path, content, ("",), Resolution(1, 1), dataset, 0)


def test_files_of_one_content_in_one_dataset():
    found = [sample("a", "1"), sample("b", "2"), sample("c", "1"), sample("d", "3"), sample("e", "1"), sample("f", "3")]
    assert same_content(found) == (("a", "c", "e"), ("d", "f"))


def test_one_file_at_several_sizes_is_no_duplicate():
    found = [sample(path, content, dataset) for dataset in (0, 1) for path, content in (("a", "1"), ("b", "1"))]
    assert same_content([found[0], found[2]]) == ()
    assert same_content(found) == (("a", "b"),)


def test_look_alikes_differ_in_few_bits_and_in_content():
    hashes = {"1": 0, "2": 0b1111, "3": 0b11111 << 20, "4": (0b11111 << 20) | 0b111, "5": 0}
    found = [sample(name, content) for name, content in zip("abcdefg", ["1", "1", "2", "3", "4", "5", "6"])]
    assert look_alikes(found, hashes) == (("a", "c", "f"), ("d", "e"))
    assert look_alikes([sample("a", "1"), sample("b", "2", dataset=1)], hashes) == ()


def groups_by_comparing_all(hashes):
    groups = [{value} for value in set(hashes)]
    while True:
        for one in groups:
            near = [two for two in groups if any((a ^ b).bit_count() <= MOST_DIFFERENT_BITS for a in one for b in two)]
            if len(near) > 1:
                groups = [group for group in groups if group not in near] + [set().union(*near)]
                break
        else:
            return groups


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=6)), max_size=25),
)
def test_groups_are_those_of_comparing_every_pair(centres, changes):
    values = [*centres, *(centres[at % len(centres)] ^ sum(1 << bit for bit in bits) for at, bits in changes)]
    hashes = {str(value): value for value in values}
    found = [sample(content, content) for content in hashes]
    expected = {frozenset(map(str, group)) for group in groups_by_comparing_all(values) if len(group) > 1}
    assert {frozenset(group) for group in look_alikes(found, hashes)} == expected


def test_many_pictures_with_the_same_border_take_no_quadratic_time():
    rng = random.Random(0)
    inner = sum(1 << (8 * row + column) for row in range(2, 6) for column in range(1, 7))
    hashes = {str(number): rng.getrandbits(64) & inner for number in range(40_000)}
    found = [sample(content, content) for content in hashes]
    begin = time.process_time()
    look_alikes(found, hashes)
    assert time.process_time() - begin < 30  # comparing every pair takes minutes
