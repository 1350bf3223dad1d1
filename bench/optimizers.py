"""Bytes per parameter of weights, gradients and optimizer state, counted in real steps, beside the arithmetic.

python -m bench.optimizers [--width 560] [--blocks 1] [--json optimizers.json]

The weights are those of one block and more of a Sana of that width (1.6B has 2240): Linear layers, 1x1 convolutions, a
depthwise convolution, biases. The bytes are those of the tensors, so they are the same on every device; what an
optimizer needs for the moment of a step is not among them.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.memory.plain_transfers import PlainStateTransfers, Traffic
from library.memory.state_offload import StateOffload
from library.memory.state_transfers import CudaStateTransfers
from library.optimizers.kahan import KahanSummation
from library.optimizers.one_by_one import Narrowing, OneByOne
from library.optimizers.rounding import Rounding
from library.training.fused_backward import FusedBackward
from library.training.optimizers import create_optimizer

STEPS = 2


@dataclass(frozen=True)
class Choice:
    """One way to keep weights, gradients and state.

    Attributes:
        optimizer: ``--optimizer_type``.
        dtype: Of weights and gradients.
        state: Bytes of state per parameter by arithmetic.
        fused: Whether gradients are used as they arrive.
        rounding: Of weights in bf16: stochastic or kahan.
        on_host: Whether the state waits on the host.
    """

    optimizer: str
    dtype: torch.dtype
    state: float
    fused: bool = False
    rounding: str = "stochastic"
    on_host: bool = False

    @property
    def expected(self) -> float:
        """Bytes per parameter on the device by arithmetic; of fused gradients and of state on the host, none."""
        return self.dtype.itemsize * (1 if self.fused else 2) + (0 if self.on_host else self.state)

    @property
    def title(self) -> str:
        """How the table calls it."""
        roundings = {"stochastic": "bf16, stochastic rounding", "kahan": "bf16, Kahan summation"}
        precision = "fp32" if self.dtype == torch.float32 else roundings[self.rounding]
        fused, on_host = ", fused backward" if self.fused else "", ", state on the host" if self.on_host else ""
        return f"{self.optimizer}, {precision}{fused}{on_host}"

    @property
    def narrowing(self) -> Narrowing | None:
        """How weights in bf16 are rounded."""
        if self.dtype != torch.bfloat16:
            return None
        return KahanSummation() if self.rounding == "kahan" else Rounding(0)


CHOICES = (
    Choice("AdamW", torch.float32, 8),
    Choice("StableAdamW", torch.float32, 8),
    Choice("CAME", torch.float32, 4),
    Choice("Lion", torch.float32, 4),
    Choice("AdamW8bit", torch.float32, 2),
    Choice("CAME8bit", torch.float32, 1),
    Choice("PagedLion8bit", torch.float32, 1),
    Choice("Adafactor", torch.float32, 0),
    Choice("AdamW", torch.bfloat16, 8),
    Choice("CAME", torch.bfloat16, 4),
    Choice("AdamW", torch.bfloat16, 10, rounding="kahan"),
    Choice("CAME", torch.bfloat16, 6, rounding="kahan"),
    Choice("AdamW8bit", torch.bfloat16, 2),
    Choice("CAME8bit", torch.bfloat16, 1),
    Choice("AdamW", torch.float32, 8, fused=True),
    Choice("CAME8bit", torch.float32, 1, fused=True),
    Choice("CAME8bit", torch.bfloat16, 1, fused=True),
    Choice("AdamW", torch.float32, 8, on_host=True),
    Choice("AdamW", torch.float32, 8, fused=True, on_host=True),
    Choice("AdamW", torch.bfloat16, 10, fused=True, rounding="kahan", on_host=True),
)


@dataclass(frozen=True)
class Measured:
    """Bytes per parameter, counted.

    Attributes:
        weights: Of the weights.
        gradients: The most that existed at a time.
        state: Of the optimizer's state after its first steps, as far as it is on the device: with state on the host,
            its small tensors and the places that the others take turns in.
        host: Of the state on the host.
    """

    weights: float
    gradients: float
    state: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """All on the device together."""
        return self.weights + self.gradients + self.state


def sana_shapes(width: int, blocks: int) -> list[tuple[int, ...]]:
    """The shapes of the weights of so many Sana blocks of this width."""
    hidden = width * 5 // 2
    linear = [(width, width)] * 8 + [(width,)] * 4  # linear attention and cross-attention, biases
    mixed = [(2 * hidden, width, 1, 1), (2 * hidden,), (2 * hidden, 1, 3, 3), (2 * hidden,), (width, hidden, 1, 1)]
    return [*linear, *mixed, (6, width)] * blocks


def measure(choice: Choice, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Measured:
    """This takes a few steps and counts."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to(device, choice.dtype)) for shape in shapes]
    groups = [{"params": weights, "lr": 1e-5}]
    optimizer = create_optimizer(choice.optimizer, (), groups, learning_rate=1e-5, device=device).optimizer
    home = None
    if choice.on_host:
        at_once = PlainStateTransfers(Traffic(), lambda tensor: None)
        home = StateOffload(
            optimizer, weights, device, CudaStateTransfers(device) if device.type == "cuda" else at_once
        )
    one_by_one = OneByOne(optimizer, choice.narrowing, home)
    fused = FusedBackward(one_by_one, weights, [str(shape) for shape in shapes]) if choice.fused else None
    living = [0]

    def count(arriving: Tensor) -> None:
        waiting = fused.waiting_bytes if fused is not None else 0
        living.append(arriving.nbytes + waiting + sum(w.grad.nbytes for w in weights if w.grad is not None))

    for weight in weights:
        weight.register_hook(count)
    for step in range(STEPS):
        # each weight has its own step of the backward pass, as in a model
        loss = torch.stack([weight.sin().float().mean() for weight in weights]).sum()
        if fused is not None:
            fused.start(step, loss, ())
        loss.backward()
        if fused is not None:
            fused.finish()
            continue
        for weight in weights:
            assert weight.grad is not None
            one_by_one.step(weight, weight.grad, step)
        one_by_one.finish()
    count_of_numbers = sum(weight.numel() for weight in weights)
    state, on_host = state_bytes(optimizer), 0
    if home is not None:
        on_host = home.host_bytes
        state += home.device_bytes - on_host
    kept = (sum(weight.nbytes for weight in weights), max(living), state, on_host)
    return Measured(*(number / count_of_numbers for number in kept))


def state_bytes(optimizer: Optimizer) -> int:
    """The memory of an optimizer's state; tensors that parameters share count once."""
    tensors = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel()
    }
    return sum(tensors.values())


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=560)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    shapes = sana_shapes(options.width, options.blocks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    headings = f"{'weights':>8} {'gradients':>10} {'state':>7} {'all':>7} {'arithmetic':>11} {'on the host':>12}"
    print(f"{'bytes per parameter':60} {headings}")
    for choice in CHOICES:
        found = measure(choice, shapes, device)
        print(
            f"{choice.title:60} {found.weights:8.2f} {found.gradients:10.2f} {found.state:7.2f} {found.total:7.2f} "
            f"{choice.expected:11.2f} {found.host:12.2f}"
        )
        rows.append({"choice": choice.title, **asdict(found), "all": found.total, "arithmetic": choice.expected})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
