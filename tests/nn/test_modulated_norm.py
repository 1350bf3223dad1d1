"""Norm, modulation and gate in one: the numbers are those of the plain expression, and less is kept."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from library.nn import modulated_norm as subject
from library.nn.modulated_norm import gated_residual, kernel_works, modulated_norm, modulated_norms

EPS = 1e-6
SIZE = (2, 5, 16)


def tensors(pairs=1, dtype=torch.float32, vectors=torch.float32, frozen=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, generator=generator).to(dtype).requires_grad_()
    width = SIZE[-1]
    made = torch.randn(SIZE[0], 1, 2 * pairs * width, generator=generator).to(vectors).requires_grad_(not frozen)
    parts = made.split(width, dim=-1)
    return x, made, list(zip(parts[::2], parts[1::2]))


def plain(x, pairs, eps):
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return tuple(normed * (1 + scale) + shift for shift, scale in pairs)


def numbers(function, *, autocast=False, **changes):
    x, vectors, pairs = tensors(**changes)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answers = function(x, pairs, EPS)
    weights = [torch.randn(SIZE, generator=torch.Generator().manual_seed(1 + number)) for number in range(len(answers))]
    sum((answer * weight).sum() for answer, weight in zip(answers, weights)).backward()
    return [*answers, x.grad] + [vectors.grad] * vectors.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("dtype", "vectors"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_the_bits_are_those_of_the_plain_expression(dtype, vectors, frozen, pairs, autocast):
    changes = {"dtype": dtype, "vectors": vectors, "frozen": frozen, "pairs": pairs, "autocast": autocast}
    ours, theirs = numbers(modulated_norms, **changes), numbers(plain, **changes)
    assert len(ours) == len(theirs) == pairs + 2 - frozen
    for one, other in zip(ours, theirs):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_gradients_are_those_of_finite_differences():
    x, vectors, _ = tensors(pairs=2, dtype=torch.float64, vectors=torch.float64)

    def answers(x, vectors):
        shift, scale, shift2, scale2 = vectors.split(SIZE[-1], dim=-1)
        return modulated_norms(x, [(shift, scale), (shift2, scale2)], EPS)

    assert torch.autograd.gradcheck(answers, (x, vectors))
    with torch.no_grad():
        assert torch.equal(modulated_norm(x, *tensors(2)[2][0], EPS), answers(x, tensors(2)[1])[0])


def kept(function, **changes):
    """Bytes that autograd keeps, each memory once."""
    x, _, pairs = tensors(**changes)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answers = function(x, pairs, EPS)
    return sum(storages.values()), answers


def test_it_keeps_the_tokens_and_not_what_is_between():
    tokens, vectors, statistics = (4 * torch.Size(size).numel() for size in (SIZE, (2, 1, 32), (2, 5, 2)))
    assert kept(modulated_norms)[0] == tokens + vectors + statistics
    assert kept(plain)[0] == 2 * tokens + vectors // 2 + statistics  # also the norm; and 1 + scale, not all vectors


def test_it_is_the_plain_expression_when_it_is_compiled(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(subject, "_ModulatedNorms", None)
    compiled = torch.compile(modulated_norms, backend="eager", fullgraph=True)
    assert all(map(torch.equal, numbers(compiled, pairs=2), numbers(plain, pairs=2)))


def test_a_gate_weighs_what_is_added():
    generator = torch.Generator().manual_seed(0)
    x, gate, update = (torch.randn(*size, generator=generator) for size in (SIZE, (2, 1, 16), SIZE))
    assert torch.equal(gated_residual(x, gate, update), x + gate * update)


def test_a_kernel_that_fails_is_told_of_once_and_left_alone(monkeypatch, caplog):
    class Broken:
        @staticmethod
        def forward(*arguments):
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "library.nn.modulated_norm_kernel", Broken)
    kernel_works.cache_clear()
    for _ in range(2):
        assert not kernel_works(torch.device("cpu"))
    kernel_works.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "the Triton kernel of norms doesn't work on cpu (RuntimeError: no such instruction): torch's own kernels run"
    ]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, whose interpreter runs anywhere")
def test_the_kernel_computes_the_same_in_tritons_interpreter():
    code = Path(__file__).with_name("interpreted_kernel.py")
    done = subprocess.run(
        [sys.executable, code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
