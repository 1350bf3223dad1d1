"""Adapters: any names of tensors; a LoRA for the model's layers survives both spellings."""

import json

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bench.fuzz_targets import TARGETS, all_targets, answer, keys
from networks.key_formats import read_weights, to_diffusers, to_kohya
from networks.lora_layer import LoraWeights
from tests.fuzz.vocabulary import JSON, TEXT, bent, examples, parses, within_limits

LAYER = "lora_unet_blocks_0_qkv"
PARTS = ["lora_down.weight", "lora_up.weight", "alpha", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "hada_w1_a", "hada_w1_b"]
THEIRS = [f"transformer.blocks.0.{part}" for part in "qkv"]
NAMES = (
    st.builds("{}.{}".format, st.sampled_from([LAYER, "lora_unet_x"]) | TEXT, st.sampled_from(PARTS) | TEXT)
    | st.builds("{}.{}.weight".format, st.sampled_from(THEIRS) | TEXT, st.sampled_from(["lora_A", "lora_B"]))
    | TEXT
)
TENSORS = st.builds(
    torch.ones,
    st.lists(st.integers(0, 3), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)


@given(data=bent(*all_targets()["keys"].seeds))
@examples(50)
def test_bent(data, tmp_path):
    parses(keys, data, tmp_path)


@given(tensors=st.dictionaries(NAMES, TENSORS, max_size=4), config=JSON)
@examples(50)
def test_any_names(tensors, config):
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    within_limits(lambda: answer(lambda: read_weights(tensors, metadata, TARGETS, "x")))


@given(pattern=TEXT, value=JSON)
@example("(a+)+$", 1)
@example("(.*.*)*", 1)
@examples(50)
def test_any_pattern_of_alphas(pattern, value):
    tensors = {f"{THEIRS[0]}.lora_A.weight": torch.ones(2, 3), f"{THEIRS[0]}.lora_B.weight": torch.ones(1, 2)}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": {pattern: value}})}
    within_limits(lambda: answer(lambda: read_weights(tensors, metadata, TARGETS, "x")))


@given(rank=st.integers(1, 4), alpha=st.floats(0.25, 8, width=16), rows=st.integers(1, 3))
@examples(25)
def test_both_spellings_and_back(rank, alpha, rows):
    generator = torch.Generator().manual_seed(rank)
    down, up = torch.randn(rank, 5, generator=generator), torch.randn(3 * rows, rank, generator=generator)
    weights = {LAYER: LoraWeights(down, up, float(alpha))}
    kohya = read_weights(to_kohya(weights), {}, TARGETS, "x")[LAYER]
    assert torch.equal(kohya.down, down) and torch.equal(kohya.up, up) and kohya.alpha == float(alpha)
    tensors, metadata = to_diffusers(weights, TARGETS)
    back = read_weights(tensors, metadata, TARGETS, "x")[LAYER]
    torch.testing.assert_close(back.delta(), weights[LAYER].delta())
