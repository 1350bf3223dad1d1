"""Prompt files, bent; each is read as each of the three kinds."""

from hypothesis import given
from hypothesis import strategies as st

from bench.fuzz_targets import all_targets
from tests.fuzz.vocabulary import bent, examples, parses

TARGET = all_targets()["prompts"]


@given(data=bent(*TARGET.seeds) | st.binary(max_size=40))
@examples(40)
def test_bent(data, tmp_path):
    parses(TARGET.parse, data, tmp_path)
