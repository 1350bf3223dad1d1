"""Checkpoints in torch's own format: their lists of contents, bent."""

from hypothesis import given
from hypothesis import strategies as st

from bench.fuzz_targets import all_targets
from tests.fuzz.vocabulary import bent, examples, parses

TARGET = all_targets()["pickle"]


@given(data=bent(*TARGET.seeds) | st.binary(max_size=40))
@examples(80)
def test_bent(data, tmp_path):
    parses(TARGET.parse, data, tmp_path)
