import json
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2Model

from library.config.errors import ConfigError
from library.text_encoders.gemma import encode_gemma, gemma_config, load_gemma

KEYS = Path(__file__).parents[1] / "data" / "keys" / "keys_gemma2_2b.txt"
IDS = torch.tensor([[2, 6, 7, 9, 0, 0], [2, 8, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=30,
        hidden_size=24,
        intermediate_size=70,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    decoder = Gemma2Model(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return decoder


def load(weights, dtype=torch.float32, prefix="model."):
    weights = {f"{prefix}{name}": value for name, value in weights.items()}
    weights["lm_head.weight"] = torch.zeros(30, 24)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return load_gemma(iter(weights.items()), shapes, device="cpu", dtype=dtype, source="gemma.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_same_as_the_model_that_was_saved(theirs, prefix):
    ours = load(theirs.state_dict(), prefix=prefix)
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in [*ours.parameters(), *ours.buffers()])
    assert not ours.training
    assert ours.config._attn_implementation == "eager"
    expected = theirs(IDS, attention_mask=MASK.long(), output_hidden_states=True)
    answer = encode_gemma(ours, IDS, MASK)
    torch.testing.assert_close(answer[MASK], expected.last_hidden_state[MASK])
    torch.testing.assert_close(expected.hidden_states[-1], expected.last_hidden_state)  # after the final norm


@torch.no_grad()
def test_padding_does_not_matter(theirs):
    ours = load(theirs.state_dict())
    short = encode_gemma(ours, IDS[1:, :2], MASK[1:, :2])
    torch.testing.assert_close(encode_gemma(ours, IDS, MASK)[1:, :2], short)


@torch.no_grad()
def test_bf16_is_near_fp32(theirs):
    exact = encode_gemma(load(theirs.state_dict()), IDS, MASK)
    rough = encode_gemma(load(theirs.state_dict(), torch.bfloat16), IDS, MASK)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact)[MASK].abs().max() < 0.1 * exact.abs().max()


def test_published_file_fits():
    shapes = {key: tuple(json.loads(shape)) for key, shape in map(lambda line: line.split("\t"), KEYS.open())}
    config = gemma_config(shapes, source="gemma")
    sizes = (config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads)
    assert sizes == (2304, 256, 8, 4)
    assert (config.intermediate_size, config.num_hidden_layers, config.vocab_size) == (9216, 26, 256000)
    tensors = ((key, torch.empty(shape, device="meta")) for key, shape in shapes.items())
    decoder = load_gemma(tensors, shapes, device="meta", dtype=torch.bfloat16, source="gemma")
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 2_614_341_888


@pytest.mark.parametrize("missing", ["embed_tokens.weight", "layers.0.pre_feedforward_layernorm.weight"])
def test_other_weights_are_refused(theirs, missing):
    weights = {name: value for name, value in theirs.state_dict().items() if name != missing}
    with pytest.raises(ConfigError, match=f"gemma.safetensors holds no Gemma 2: {missing} is missing"):
        load(weights)


def test_fp16_is_refused(theirs):
    with pytest.raises(ConfigError, match="Gemma 2 overflows in fp16"):
        load(theirs.state_dict(), torch.float16)
