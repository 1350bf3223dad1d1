import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from library.memory.allocations import BLOCK, Allocations, on_gradients
from library.memory.as_on_cuda import AsOnCuda
from library.memory.hollow import Hollow

KIB = 1 << 10


def test_the_peak_is_that_of_what_is_alive_at_once():
    with Allocations("cpu") as allocations:
        kept = torch.empty(256, dtype=torch.float32)  # 1 KiB
        allocations.start("more")
        passing = torch.empty(4 * KIB, dtype=torch.uint8)
        view = passing[100:].view(-1)
        del passing
        assert allocations.alive == 5 * KIB  # the view holds it
        del view
        last = torch.empty(2 * KIB, dtype=torch.uint8)
    assert allocations.peak == 5 * KIB
    assert allocations.alive == 3 * KIB
    assert allocations.at_peak() == {"": KIB, "more": 4 * KIB}
    del kept, last


def test_sizes_are_rounded_as_the_allocator_does():
    with Allocations("cpu") as allocations:
        one = torch.zeros(1)
        assert allocations.alive == BLOCK
        del one
    assert allocations.alive == 0


def test_components_are_named_and_left_out():
    with Allocations("cpu") as allocations:
        weight = torch.zeros(KIB, dtype=torch.uint8)
        host = torch.zeros(8 * KIB, dtype=torch.uint8)
        allocations.leave_out(host)
        allocations.name([weight], "weights")
        allocations.start("work")
        work = host + 1
        allocations.rename("work", "kept")
        more = host[:KIB] + 1
    assert allocations.at_peak() == {"weights": KIB, "kept": 8 * KIB, "work": KIB}
    del work, more, host
    gc.collect()
    assert allocations.alive == KIB


def test_other_devices_do_not_count():
    with Allocations("cpu") as allocations:
        torch.empty(KIB, device="meta")
    assert allocations.peak == 0


def test_gradients_are_seen_as_they_arrive():
    weight = nn.Parameter(torch.ones(16))
    seen = []
    on_gradients([weight], seen.append)
    (weight * 2).sum().backward()
    assert torch.equal(seen[0], torch.full((16,), 2.0))


def counted(work):
    with Allocations("cpu") as allocations:
        work()
    return allocations.operations


def test_products_count_two_operations_for_each_term():
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    assert counted(lambda: a @ b) == 2 * 3 * 5 * 7
    assert counted(lambda: (a @ b).sum().backward()) == 2 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolutions_gradients_cost_as_much_as_itself_each(groups):
    x = torch.ones(2, 8, 6, 6, requires_grad=True)
    weight = torch.ones(8, 8 // groups, 3, 3, requires_grad=True)
    forward = 2 * 2 * 36 * weight.numel()
    assert counted(lambda: F.conv2d(x, weight, padding=1, groups=groups)) == forward
    assert counted(lambda: F.conv2d(x, weight, padding=1, groups=groups).sum().backward()) == 3 * forward


def test_attention_counts_its_matrices_and_twice_so_many_backward():
    q, k = torch.ones(2, 3, 10, 16, requires_grad=True), torch.ones(2, 3, 6, 16, requires_grad=True)
    forward = 4 * 2 * 3 * 10 * 6 * 16
    assert counted(lambda: F.scaled_dot_product_attention(q, k, k)) == forward
    assert counted(lambda: F.scaled_dot_product_attention(q, k, k).sum().backward()) == 3 * forward


def test_attention_never_makes_a_matrix_of_all_pairs():
    with Hollow(), Allocations("cpu") as allocations:
        q = torch.zeros(1, 1, 1 << 15, 64, dtype=torch.bfloat16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert allocations.peak < 64 * q.nbytes // 4 < (1 << 30)


def test_on_cuda_autocast_widens_norms_and_a_norm_is_one_kernel():
    def norms():
        x = torch.zeros(64, 128, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.ones(128, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            return F.layer_norm(x, (128,)), F.rms_norm(x, (128,), weight, 1e-6), F.silu(x), x, weight

    with Hollow():
        assert norms()[0].dtype == torch.bfloat16
        with AsOnCuda():
            layer, rms, silu, x, weight = norms()
            assert (layer.dtype, rms.dtype, silu.dtype) == (torch.float32, torch.float32, torch.bfloat16)
            torch.autograd.backward([rms.sum()])
            assert x.grad.shape == x.shape and weight.grad.shape == weight.shape
            assert F.layer_norm(x, (128,)).dtype == torch.bfloat16  # no autocast here
