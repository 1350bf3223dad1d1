import pickle
import sys
import types

import pytest
import torch

from library.config.errors import ConfigError
from library.nn.attention import attention_function


def heads(count=3, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 8, generator=generator) for tokens in (5, 7, 7)]


def by_hand(q, k, v, bias=0.0):
    return (q @ k.transpose(-1, -2) / 8**0.5 + bias).softmax(-1) @ v


def fake_memory_efficient_attention(q, k, v, attn_bias=None):
    """xformers' contract: (B, N, heads, head_dim) in and out; a bias of full shape, in rows of 8, of q's dtype."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if attn_bias is None:
        return by_hand(q, k, v).transpose(1, 2)
    assert attn_bias.shape == (*q.shape[:3], k.shape[2])
    assert attn_bias.stride(-2) % 8 == 0
    assert attn_bias.dtype == q.dtype
    return by_hand(q, k, v, attn_bias).transpose(1, 2)


@pytest.fixture(params=["sdpa", "xformers"])
def attention(request, monkeypatch):
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = fake_memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return attention_function(request.param)


def test_it_is_softmax_attention(attention):
    q, k, v = heads()
    assert torch.allclose(attention(q, k, v), by_hand(q, k, v), atol=1e-6)


def test_a_bool_mask_says_where_to_look_and_a_float_is_added(attention):
    q, k, v = heads()
    allowed = torch.rand(2, 1, 1, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    assert 0 < allowed.sum() < allowed.numel()
    minus_infinity = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    assert torch.allclose(attention(q, k, v, allowed), by_hand(q, k, v, minus_infinity), atol=1e-6)
    bias = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(attention(q, k, v, bias), by_hand(q, k, v, bias), atol=1e-6)


def test_it_can_be_pickled(attention):
    q, k, v = heads()
    assert torch.equal(pickle.loads(pickle.dumps(attention))(q, k, v), attention(q, k, v))


def test_xformers_is_imported_when_it_is_chosen_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    attention_function("sdpa")
    with pytest.raises(ConfigError, match="pip install xformers"):
        attention_function("xformers")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'flash' is not known; it is one of sdpa, xformers"):
        attention_function("flash")
