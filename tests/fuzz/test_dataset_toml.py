"""Descriptions of datasets: valid documents bent, and tables whose keys are known and whose values are anything."""

import dataclasses
import json

from hypothesis import example, given
from hypothesis import strategies as st

from bench.fuzz_targets import all_targets, dataset_json, dataset_toml
from library.config.dataset import SubsetConfig, TomlKeys
from library.config.pictures import PictureConfig
from library.config.resolved import toml_value
from tests.fuzz.vocabulary import JSON, bent, examples, parses

KEYS = sorted({field.name for group in (SubsetConfig, TomlKeys, PictureConfig) for field in dataclasses.fields(group)})
SIZES = st.sampled_from([0, 1, -1, 16, 64, 10**9, 10**12, 2**63, 10**400, 1e300, float("nan"), True, "1024,768"])
TABLE = st.dictionaries(st.sampled_from(KEYS), SIZES | JSON, max_size=4)
SUBSET = st.builds(lambda table: {"image_dir": ".", **table}, TABLE)
DATASET = st.builds(
    lambda table, subsets: {"resolution": 64, **table, "subsets": subsets}, TABLE, st.lists(SUBSET, max_size=2)
)


@given(data=bent(*all_targets()["dataset_toml"].seeds))
@example(data=b"a=" + b"[" * 100_000)
@example(data=b".".join([b"a"] * 100_000) + b"=1")
@examples(60)
def test_bent_toml(data, tmp_path):
    parses(dataset_toml, data, tmp_path)


@given(data=bent(*all_targets()["dataset_json"].seeds))
@example(data=b'{"a":' * 100_000)
@examples(50)
def test_bent_json(data, tmp_path):
    parses(dataset_json, data, tmp_path)


@given(general=TABLE, datasets=st.lists(DATASET, min_size=1, max_size=2))
@examples(60)
def test_any_value_of_known_keys(general, datasets, tmp_path):
    parses(dataset_json, json.dumps({"general": general, "datasets": datasets}).encode(), tmp_path)


@given(key=st.sampled_from(KEYS), value=SIZES)
@examples(60)
def test_any_size(key, value, tmp_path):
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '.'\n{key} = {toml_value(value)}\n"
    parses(dataset_toml, text.encode(), tmp_path)
