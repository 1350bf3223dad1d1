"""The light part of a run's state, bent."""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from bench.fuzz_targets import all_targets
from tests.fuzz.vocabulary import JSON, bent, examples, parses

TARGET = all_targets()["state"]


@given(data=bent(*TARGET.seeds) | st.binary(max_size=40))
@examples(50)
def test_bent(data, tmp_path):
    parses(TARGET.parse, data, tmp_path)


@given(content=st.fixed_dictionaries({"format": st.just(1) | JSON, "checksums": JSON}, optional={"settings": JSON}))
@example(content={"format": 1, "checksums": [[None, None]]})
@examples(40)
def test_made_up(content, tmp_path):
    parses(TARGET.parse, json.dumps(content).encode(), tmp_path)
