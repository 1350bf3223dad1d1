"""Operations without numbers give what operations with numbers give, numbers apart."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from library.memory.allocations import BLOCK, Allocations
from library.memory.hollow import Hollow, hollow


def layouts(values):
    return [
        (tuple(value.shape), value.stride(), value.dtype, value.untyped_storage().nbytes())
        for value in values
        if isinstance(value, torch.Tensor)
    ]


def work():
    """Creation, views, products, norms, attention, convolutions, types, randomness; forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 64, requires_grad=True)
    linear = nn.Linear(64, 192)
    q, k, v = linear(x).view(2, 6, 3, 2, 32).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v)
    normed = F.layer_norm(attended.transpose(1, 2).flatten(2), (64,)).to(torch.bfloat16)
    picture = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    convolved = F.conv2d(picture, torch.ones(8, 1, 3, 3, requires_grad=True), padding=1, groups=4)
    joined = torch.cat([normed, normed[:, :2]], dim=1)
    loss = joined.float().square().mean() + convolved.sum()
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear(x)
    moved = x.detach().clone().add_(1).mul_(torch.tensor(2.0))
    codes = torch.bucketize(x.detach(), torch.linspace(-1, 1, 15)).to(torch.uint8)
    return [attended, normed, picture, convolved, joined, loss, x.grad, linear.weight.grad, cast, moved, codes]


def test_layouts_are_those_of_operations_with_numbers():
    expected = layouts(work())
    with Hollow():
        assert layouts(work()) == expected


def test_views_share_memory_and_what_is_changed_in_place_stays_itself():
    with Hollow():
        x = torch.empty(4, 4)
        assert x[1:].view(-1).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert x.add_(1) is x
        assert torch.add(x, 1, out=(out := torch.empty(4, 4))) is out
        assert (x + 1).untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        y = torch.ops.aten._unsafe_view(x, [16])
        assert y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    with Hollow(), Allocations("cpu") as allocations:
        x = torch.empty(4, 4)
        x.mul_(2).add_(1)
        torch.add(x, 1, out=x)
        assert allocations.peak == BLOCK


def test_numbers_without_a_type_have_the_one_that_is_the_default_now():
    with Hollow():
        assert torch.ones(3).dtype == (torch.arange(3) / 2).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.ones(3).dtype == (torch.arange(3) / 2).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_what_counts_allocations_may_do_without_numbers_itself():
    with Hollow(), Allocations("cpu") as apart:
        work()
    with Allocations("cpu", hollow) as together:
        assert layouts(work()) == layouts(work())
        assert torch.randn(3, 3).sum().item() == 1.0
        together.start("")
        work()
    assert (together.peak, together.operations) == (apart.peak, apart.operations) != (0, 0)


def test_who_asks_for_numbers_gets_some():
    with Hollow():
        assert torch.randn(3, 3).sum().item() == 1.0
        assert not torch.ones(3, dtype=torch.bool).any()
        assert torch.arange(5)[3].item() == 1
        assert torch.full((3,), 7.0).tolist() == [0.0] * 3


def test_memory_is_never_touched():
    """Writing a terabyte would take minutes."""
    with Hollow():
        x = torch.randn(1 << 30)  # 4 GiB
        for _ in range(256):
            x = (x * 2).relu_()
        assert x.numel() == 1 << 30


@pytest.mark.skipif(sys.platform == "win32", reason="there, what is reserved is set aside")
def test_more_is_reserved_than_any_host_has():
    with Hollow():
        x = torch.empty(1 << 42)  # 16 TiB
        assert x.view(1 << 21, 1 << 21).t().add(1).stride() == (1, 1 << 21)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_that_was_reserved_is_left_of_a_model_that_is_gone():
    """In malloc's heap one small tensor behind a model keeps all its addresses, and then no process can be forked."""

    def data() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))

    before, kept = data(), []
    with Hollow():
        for _ in range(4):
            model = [torch.empty(20 << 20, dtype=torch.uint8) for _ in range(200)]  # malloc's heap takes up to 32 MiB
            kept.append(torch.empty(100))
            del model
    assert data() - before < 1 << 30


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
def test_optimizers_step(name):
    with Hollow():
        weight = nn.Parameter(torch.randn(8, 8))
        optimizer = getattr(torch.optim, name)([weight], lr=1e-3)
        for _ in range(2):
            weight.grad = torch.randn(8, 8)
            optimizer.step()
        sizes = {key: value.shape for key, value in optimizer.state[weight].items()}
    real = nn.Parameter(torch.randn(8, 8))
    optimizer = getattr(torch.optim, name)([real], lr=1e-3)
    real.grad = torch.randn(8, 8)
    optimizer.step()
    assert sizes == {key: value.shape for key, value in optimizer.state[real].items()}
