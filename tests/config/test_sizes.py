import pytest

from library.config.memory import MemoryConfig
from library.config.options import build
from library.config.sizes import parse_count_or_auto, parse_size, size_in_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 * 2**30), ("11.5 GiB", 23 * 2**29), ("24GB", 24 * 10**9), ("800mib", 800 * 2**20), ("1TB", 10**12)],
)
def test_amounts(text, size):
    assert parse_size(text) == text and size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "12", "GiB", "-1GiB", "0GiB", "12 apples", "1e3GiB", 12, True])
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match="expected an amount such as 12GiB"):
        parse_size(text)


def test_auto():
    assert parse_size("AUTO") == parse_count_or_auto("Auto") == "auto"


@pytest.mark.parametrize("value", ["-1", "1.5", "all", True, "", 2.0])
def test_what_is_no_count(value):
    with pytest.raises(ValueError, match="expected a whole number of at least 0, or auto"):
        parse_count_or_auto(value)


def test_options_are_read_from_words_and_files():
    typed, from_file = {"blocks_to_swap": ["7"], "fit": ["12GiB"]}, {"blocks_to_swap": 7, "fit": "12GiB"}
    for given in ((typed, {}), ({}, from_file)):
        memory = build({"memory": MemoryConfig}, *given).groups["memory"]
        assert (memory.blocks_to_swap, memory.fit, memory.swaps_automatically) == (7, "12GiB", False)
    assert build({"memory": MemoryConfig}, {"blocks_to_swap": ["auto"]}).groups["memory"].swaps_automatically
    problems = build({"memory": MemoryConfig}, {"fit": ["12"]}).problems
    assert problems == ("--fit: expected an amount such as 12GiB, 11.5GiB or 24GB, or auto, got '12'",)
