"""safetensors headers, bent and made up; a file that safetensors itself wrote says the same here."""

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save

from bench.fuzz_targets import all_targets, header, safetensors
from library.io.header import parse_header
from tests.fuzz.vocabulary import JSON, TEXT, bent, examples, parses

SIDES = st.integers() | st.sampled_from([0, 1, 2**31, 2**63, 2**64, -1]) | JSON
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8", "X"]) | JSON},
    optional={
        "shape": st.lists(SIDES, max_size=3) | JSON,
        "data_offsets": st.lists(SIDES, min_size=2, max_size=2) | JSON,
    },
)


@given(data=bent(*all_targets()["header"].seeds))
@examples(80)
def test_bent(data, tmp_path):
    parses(header, data, tmp_path)


@given(tensors=st.dictionaries(TEXT, ENTRY | JSON, max_size=3), metadata=JSON, data=st.binary(max_size=16))
@example(tensors={"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}, metadata=None, data=b"1234")
@example(tensors={"a": {"dtype": "U8", "shape": [True], "data_offsets": [False, 1]}}, metadata=None, data=b"1")
@examples(80)
def test_made_up(tensors, metadata, data, tmp_path):
    parses(header, safetensors(tensors, metadata, data), tmp_path)


@given(length=st.integers(0, 2**64 - 1), rest=st.binary(max_size=20))
@examples(50)
def test_lengths(length, rest, tmp_path):
    parses(header, struct.pack("<Q", length) + b"{" + rest, tmp_path)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)


@given(
    shapes=st.dictionaries(NAMES, st.lists(st.integers(0, 3), max_size=3), max_size=4),
    metadata=st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"])), max_size=3),
)
@examples(60)
def test_what_safetensors_wrote_is_read_as_it_was(shapes, metadata):
    data = save({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, metadata or None)
    found = parse_header(Path("x"), BytesIO(data), len(data))
    assert found.shapes == {name: tuple(shape) for name, shape in shapes.items()}
    assert found.metadata == metadata
