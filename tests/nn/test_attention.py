import pickle
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.config.errors import ConfigError
from library.nn.attention import NAMES, attention_function


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


def fake_flash_attn_func(q, k, v):
    """flash-attn's contract: (B, N, heads, head_dim) in and out, and no mask."""
    return by_hand(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)


def fake_sageattn(q, k, v, tensor_layout, is_causal):
    """SageAttention's contract."""
    assert tensor_layout == "HND" and not is_causal
    return by_hand(q, k, v).detach()


@pytest.fixture(params=NAMES)
def attention(request, monkeypatch):
    flash, sage = types.ModuleType("flash_attn"), types.ModuleType("sageattention")
    flash.flash_attn_func, sage.sageattn = fake_flash_attn_func, fake_sageattn
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "sageattention", sage)
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


def test_gradients_are_those_of_softmax_attention_or_refused(attention):
    tensors = [tensor.requires_grad_() for tensor in heads()]
    if "sage" in str(attention):
        with pytest.raises(ValueError, match="no backward pass"):
            attention(*tensors)
        return
    for mask in (None, (torch.arange(7) < 4).view(1, 1, 1, 7)):
        bias = 0.0 if mask is None else torch.zeros(1, 1, 1, 7).masked_fill(~mask, float("-inf"))
        expected = torch.autograd.grad(by_hand(*tensors, bias).square().sum(), tensors)
        actual = torch.autograd.grad(attention(*tensors, mask).square().sum(), tensors)
        for ours, theirs in zip(actual, expected):
            assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "torch-flash"])
def test_it_can_be_compiled_whole(name):
    torch._dynamo.reset()
    attention = attention_function(name)
    compiled = torch.compile(lambda q, k, v: attention(q * 2, k, v), backend="aot_eager", fullgraph=True)
    tensors = [tensor.requires_grad_() for tensor in heads()]
    gradients = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    expected = torch.autograd.grad(attention(tensors[0] * 2, *tensors[1:]).square().sum(), tensors)
    for ours, theirs in zip(gradients, expected):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_kernel_that_was_named_goes_first():
    with torch.profiler.profile() as profile:
        attention_function("sdpa")(*heads())
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.key for event in profile.key_averages()}
    with sdpa_kernel(SDPBackend.MATH), torch.profiler.profile() as profile:
        attention_function("torch-flash")(*heads())
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    ("name", "module", "line"),
    [
        ("xformers", "xformers.ops", "--xformers: .*; run `pip install xformers`"),
        ("flash", "flash_attn", "--attn_mode flash: .*; run `pip install flash-attn --no-build-isolation`"),
        ("sage", "sageattention", "--attn_mode sage: .*; run `pip install sageattention`"),
    ],
)
def test_packages_are_imported_when_they_are_chosen_only(name, module, line, monkeypatch):
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.setitem(sys.modules, module, None)
    attention_function("sdpa")
    with pytest.raises(ConfigError, match=line):
        attention_function(name)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'flush' is not known; it is one of sdpa, torch-cudnn"):
        attention_function("flush")
