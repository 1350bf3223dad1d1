import math

import pytest
import torch

from library.memory.eight_bit import DEQUANTIZE, EIGHT_BIT, Matmul
from library.memory.matmul_choice import PLAIN, Times, describe, measure
from library.memory.quantization import FORMATS

CPU = torch.device("cpu")


def timed(answers, *, broken=()):
    """What is measured when the works, in their order, take these times; those in ``broken`` fail."""
    numbers = iter(range(1000))

    def timer(work):
        number = next(numbers)
        if number % 6 in broken:
            raise RuntimeError("not implemented")
        assert work().dtype == torch.bfloat16
        return answers[number % 6]

    sizes = {(32, 48): 2, (64, 16): 5}
    return measure(FORMATS["int8"], sizes, 40, device=CPU, dtype=torch.bfloat16, timer=timer)


def test_each_way_is_measured_once_a_size_and_counts_as_often_as_there_are_layers():
    times = timed([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])
    assert times.forward == {PLAIN: 7.0, DEQUANTIZE: 14.0, EIGHT_BIT: 21.0}
    assert times.backward == {PLAIN: 70.0, DEQUANTIZE: 140.0, EIGHT_BIT: 210.0}
    assert times.best == Matmul(DEQUANTIZE, DEQUANTIZE) and times.slowdown == 2.0


def test_the_faster_way_is_taken_in_each_direction():
    assert timed([4.0, 5.0, 2.0, 4.0, 5.0, 7.0]).best == Matmul(EIGHT_BIT, DEQUANTIZE)
    assert timed([4.0, 5.0, 2.0, 4.0, 5.0, 3.0]).best == Matmul(EIGHT_BIT, EIGHT_BIT)
    assert timed([4.0, 2.0, 2.5, 4.0, 5.0, 3.0]).best == Matmul(DEQUANTIZE, EIGHT_BIT)


def test_what_the_device_refuses_is_not_chosen():
    times = timed([4.0, 5.0, 2.0, 4.0, 5.0, 3.0], broken=(2,))
    assert times.forward[EIGHT_BIT] == math.inf and times.best == Matmul(DEQUANTIZE, EIGHT_BIT)
    with pytest.raises(RuntimeError, match="not implemented"):
        timed([4.0, 5.0, 2.0, 4.0, 5.0, 3.0], broken=(0,))


def test_slower_than_without_is_said_plainly():
    slow = Times({PLAIN: 1.0, DEQUANTIZE: 3.0, EIGHT_BIT: 2.0}, {PLAIN: 1.0, DEQUANTIZE: 2.5, EIGHT_BIT: 4.0})
    told = describe(slow, FORMATS["int8"], rows=4096, dtype=torch.bfloat16, saved_bytes=300 << 20)
    assert "bfloat16 1.00 + 1.00 ms, dequantised 3.00 + 2.50 ms, 8-bit 2.00 + 4.00 ms" in told
    assert "Forward is computed in 8 bits, backward by dequantising" in told and "with 4096 rows" in told
    assert told.endswith("int8 saves 300 MiB and makes the step's matrix products 2.25 times slower than bfloat16 here")
    fast = Times({PLAIN: 2.0, DEQUANTIZE: 3.0, EIGHT_BIT: 1.0}, {PLAIN: 2.0, DEQUANTIZE: 2.5, EIGHT_BIT: 2.0})
    told = describe(fast, FORMATS["int8"], rows=4096, dtype=torch.bfloat16, saved_bytes=300 << 20)
    assert told.endswith("saves 300 MiB and the step's matrix products take 0.75 of bfloat16's time here")
