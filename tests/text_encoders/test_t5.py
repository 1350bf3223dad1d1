import json
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from library.config.errors import ConfigError
from library.text_encoders.t5 import encode_t5, load_t5, t5_config

KEYS = Path(__file__).parents[1] / "data" / "keys" / "keys_t5xxl.txt"
IDS = torch.tensor([[5, 6, 7, 1, 0, 0], [8, 1, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    # heads * d_kv is not d_model, and 5 is no divisor of anything: no size can stand in for another
    config = T5Config(
        vocab_size=30, d_model=48, d_kv=8, d_ff=70, num_layers=2, num_heads=5, feed_forward_proj="gated-gelu"
    )
    encoder = T5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return encoder


def stored(encoder):
    weights = dict(encoder.state_dict())
    del weights["encoder.embed_tokens.weight"]
    return weights


def load(weights, dtype=torch.float32):
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return load_t5(iter(weights.items()), shapes, device="cpu", dtype=dtype, source="t5.safetensors")


@torch.no_grad()
def test_same_as_the_model_that_was_saved(theirs):
    ours = load(stored(theirs))
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in [*ours.parameters(), *ours.buffers()])
    assert not ours.training
    torch.testing.assert_close(encode_t5(ours, IDS, None), theirs(IDS).last_hidden_state)
    torch.testing.assert_close(encode_t5(ours, IDS, MASK), theirs(IDS, attention_mask=MASK.long()).last_hidden_state)


def test_published_file_fits():
    lines = KEYS.read_text().splitlines()
    shapes = {key: tuple(json.loads(shape)) for key, shape in (line.split("\t") for line in lines)}
    config = t5_config(shapes, source="t5xxl")
    sizes = (config.d_model, config.d_kv, config.num_heads, config.d_ff, config.num_layers, config.vocab_size)
    assert sizes == (4096, 64, 64, 10240, 24, 32128)
    tensors = ((key, torch.empty(shape, device="meta")) for key, shape in shapes.items())
    load_t5(tensors, shapes, device="meta", dtype=torch.float16, source="t5xxl")


@torch.no_grad()
@pytest.mark.parametrize("names", [["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]])
def test_the_embedding_may_have_either_name_or_both(theirs, names):
    weights = stored(theirs)
    embedding = weights.pop("shared.weight")
    ours = load(weights | dict.fromkeys(names, embedding))
    assert ours.encoder.embed_tokens is ours.shared
    torch.testing.assert_close(encode_t5(ours, IDS, None), theirs(IDS).last_hidden_state)


def test_a_decoder_beside_it_is_left_out(theirs):
    load(stored(theirs) | {"decoder.final_layer_norm.weight": torch.ones(48), "lm_head.weight": torch.ones(30, 48)})


@torch.no_grad()
def test_the_mask_hides_padding(theirs):
    ours = load(stored(theirs))
    masked = encode_t5(ours, IDS, MASK)
    other_padding = torch.where(MASK, IDS, 9)
    torch.testing.assert_close(encode_t5(ours, other_padding, MASK)[MASK], masked[MASK])
    assert not torch.allclose(encode_t5(ours, IDS, None)[MASK], masked[MASK], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_fp16_stays_finite_where_the_feed_forward_overflows(theirs, autocast, storage):
    weights = {name: value.to(storage) for name, value in stored(theirs).items()}
    for name in weights:
        if name.endswith("wo.weight"):
            weights[name] = weights[name] * 3e4
    expected = encode_t5(load(weights), IDS, None)
    ours = load(weights, torch.float16)
    residual = []
    ours.encoder.block[0].register_forward_hook(lambda module, args, output: residual.append(output))
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        features = encode_t5(ours, IDS, None)
    first = residual[0][0] if isinstance(residual[0], tuple) else residual[0]
    assert first.abs().max() > torch.finfo(torch.float16).max  # the test would prove nothing otherwise
    assert features.dtype == torch.float16 and features.isfinite().all()
    torch.testing.assert_close(features.float(), expected, atol=0.03, rtol=0.03)


def test_only_the_last_layers_are_kept_in_fp32(theirs):
    ours = load(stored(theirs), torch.float16)
    wide = {name for name, parameter in ours.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)}
    assert all(parameter.dtype == torch.bfloat16 for parameter in load(stored(theirs), torch.bfloat16).parameters())


def test_another_file_is_an_error():
    with pytest.raises(ConfigError, match=r"clip\.safetensors holds no T5 v1\.1 encoder"):
        t5_config({"text_model.final_layer_norm.weight": (10,)}, source="clip.safetensors")


def test_a_missing_tensor_is_an_error(theirs):
    weights = stored(theirs)
    del weights["encoder.block.1.layer.0.layer_norm.weight"]
    with pytest.raises(ConfigError, match=r"t5\.safetensors .*block\.1\.layer\.0\.layer_norm"):
        load(weights)
