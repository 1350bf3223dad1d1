import sys
from types import ModuleType

import pytest
import torch

from library.memory import nf4_kernel
from library.memory.nf4_kernel import by_bitsandbytes, fast_dequantize
from library.memory.quantization import FORMATS, GROUP

NF4 = FORMATS["nf4"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def fresh():
    """No answer is remembered from other tests, nor for them."""
    fast_dequantize.cache_clear()
    yield
    fast_dequantize.cache_clear()


@pytest.mark.reference
@pytest.mark.parametrize("dtype", TYPES)
def test_bitsandbytes_reads_our_buffers_as_they_are(dtype):
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(48, 3 * GROUP, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 48)[:, None]
    codes, scales = NF4.quantize(weight)
    theirs = by_bitsandbytes(codes, scales, dtype)
    assert theirs.shape == weight.shape and theirs.dtype == dtype
    assert torch.equal(theirs, NF4.dequantize(codes, scales, dtype))


@pytest.mark.reference
def test_it_is_taken_where_it_gives_the_same_bits(fresh):
    pytest.importorskip("bitsandbytes")
    fast = fast_dequantize(torch.device("cpu"), torch.float32, NF4.dequantize_plainly)
    assert fast is not None
    codes, scales = NF4.quantize(torch.randn(32, GROUP, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(fast(codes, scales, torch.float32), NF4.dequantize_plainly(codes, scales, torch.float32))
    other = fast_dequantize(torch.device("cpu"), torch.float32, lambda *codes: NF4.dequantize_plainly(*codes) * 1.01)
    assert other is None


@pytest.mark.parametrize("broken", ["missing", "does not run"])
def test_without_it_ours_is_taken(fresh, monkeypatch, broken):
    def refuse(*arguments, **options):
        raise RuntimeError("no kernel for this CUDA")

    if broken == "missing":
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    else:
        monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
        monkeypatch.setattr(nf4_kernel, "by_bitsandbytes", refuse)
    assert fast_dequantize(torch.device("cpu"), torch.float32, NF4.dequantize_plainly) is None
