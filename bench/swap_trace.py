"""What block swap does in a step, turn by turn: what is on the device, what travels meanwhile, and who waits for it.

python -m bench.swap_trace --size tiny --blocks_to_swap 2 [--full] [--checkpointing] [--json trace.json]

The model has random weights. On a GPU the copies are real and timed by the device itself; elsewhere they are made on
the host at once, and what is shown is their order and what is resident.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.synthetic_run import family_of
from library.config.network import NetworkConfig
from library.families import FAMILIES
from library.memory.block_swap import BlockSwap
from library.memory.checkpointing import enable_checkpointing
from library.memory.transfer_trace import TransferTrace, Turn
from library.memory.transfers import CudaTransfers, Transfers
from library.optimizers.one_by_one import OneByOne
from library.records import NoisedLatents
from library.training.fused_backward import FusedBackward
from networks.lora import inject
from networks.settings import read_settings

_MIB = 1 << 20


class HostTransfers:
    """``Transfers`` from the host to itself, each made when it is asked for."""

    def host_buffer(self, size: int) -> Tensor:
        """See ``Transfers``."""
        return torch.empty(size, dtype=torch.uint8)

    def device_buffer(self, size: int) -> Tensor:
        """See ``Transfers``."""
        return torch.empty(size, dtype=torch.uint8)

    def fetch(self, source: Tensor, target: Tensor, slot: int) -> None:
        """See ``Transfers``."""
        target.copy_(source)

    def wait(self, slot: int) -> None:
        """See ``Transfers``."""

    def send_home(self, source: Tensor, target: Tensor, slot: int) -> None:
        """See ``Transfers``."""
        target.copy_(source)

    def wait_home(self) -> None:
        """See ``Transfers``."""


@dataclass(frozen=True)
class Traced:
    """A model that trains on random numbers, its blocks swapped.

    Attributes:
        step: Does one optimizer step.
        blocks: Of the model.
        swap: What takes them to and fro.
        trace: What it did.
    """

    step: Callable[[], None]
    blocks: int
    swap: BlockSwap
    trace: TransferTrace


def traced(family_name: str, options: argparse.Namespace, device: torch.device) -> Traced:
    """The model at ``--size`` with an adapter, or with ``--full`` trained whole by AdamW in the backward pass.

    Raises:
        ValueError: It has fewer blocks than are to be swapped.
    """
    synthetic = import_module(f"{FAMILIES[family_name]}.synthetic")
    family = synthetic.synthetic_family(options.size)
    mixed = options.precision == "bf16"
    dtype = torch.bfloat16 if mixed and not options.full else torch.float32
    denoiser: nn.Module = synthetic.synthetic_denoiser(options.size, device=device, dtype=dtype)
    denoiser.requires_grad_(options.full)
    blocks = list(family.blocks(denoiser))
    trace = TransferTrace(_transfers(device))
    checkpointed = range(len(blocks)) if options.checkpointing else ()
    swap = BlockSwap(blocks, options.blocks_to_swap, trace, checkpointed=checkpointed)
    if options.checkpointing:
        enable_checkpointing(blocks, 1)
    update = _whole(denoiser, swap) if options.full else _adapter(family, denoiser, options.rank, device)
    latents = family.latents.format
    shape = (options.batch_size, latents.channels, *(side // latents.stride for side in (options.resolution,) * 2))
    noise = torch.randn(shape, device=device)
    noised = NoisedLatents(x_t=noise, sigma=torch.full((options.batch_size,), 0.5, device=device))
    text = synthetic.synthetic_text(options.size, options.batch_size, device=device, dtype=dtype)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            prediction = family.predict(denoiser, noised, text)
        update((prediction.float() - noise).square().mean())

    return Traced(step, len(blocks), swap, trace)


def _transfers(device: torch.device) -> Transfers:
    return CudaTransfers(device) if device.type == "cuda" else HostTransfers()


def _whole(denoiser: nn.Module, swap: BlockSwap) -> Callable[[Tensor], None]:
    """Goes backward from a loss, all weights stepping on the way."""
    names, parameters = zip(*denoiser.named_parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    fused = FusedBackward(OneByOne(optimizer), parameters, names, swap.changed)
    swap.settle = fused.settle

    def update(loss: Tensor) -> None:
        fused.start(0, loss, ())
        loss.backward()
        fused.finish()

    return update


def _adapter(family: Any, denoiser: nn.Module, rank: int, device: torch.device) -> Callable[[Tensor], None]:
    """Puts an adapter on the denoiser; what it returns goes backward from a loss, and the adapter steps."""
    settings = read_settings(NetworkConfig(network_dim=rank, network_alpha=rank), family.adapter_targets)
    adapter = inject({"denoiser": denoiser}, family.adapter_targets, settings, run_seed=0, metadata={}).to(device)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)

    def update(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def timeline(turns: list[Turn]) -> list[str]:
    """A line per turn, under headings."""
    timed = any(turn.late is not None for turn in turns)
    heads = ["pass", "block", "on the device", "begins to come", "begins to go", "came"]
    rows = [[*heads, "waited, ms"] if timed else heads]
    for turn in turns:
        came = {None: "was there", 0: "now", 1: "1 turn ahead"}.get(turn.ahead, f"{turn.ahead} turns ahead")
        row = ["backward" if turn.backward else "forward", str(turn.block)]
        row += [" ".join(map(str, blocks)) for blocks in (turn.resident, turn.fetched, turn.sent)]
        rows.append([*row, came, *([] if turn.late is None else [f"{turn.late * 1e3:.2f}"])])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [" | ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]


def facts(trace: TransferTrace, steps: int, device: torch.device) -> dict[str, Any]:
    """What the steps add up to, per step."""
    totals = trace.totals()
    told: dict[str, Any] = {
        "fetched_mib_per_step": totals.fetched / steps / _MIB,
        "sent_home_mib_per_step": totals.sent / steps / _MIB,
    }
    if totals.copying is not None and totals.waiting is not None:
        told["copying_ms_per_step"] = totals.copying / steps * 1e3
        told["waiting_ms_per_step"] = totals.waiting / steps * 1e3
        told["share_hidden"] = totals.hidden
        told["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return told


def main() -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), help="by default the one that has the size; tiny: sd3")
    parser.add_argument("--size", default="tiny", help="a published size of the family, or tiny (default)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels per side")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--full", action="store_true", help="train all weights, in fp32, instead of an adapter")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--blocks_to_swap", type=int, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=3, help="of which the last one is shown")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the turns of the last step and the numbers here")
    options = parser.parse_args()
    try:
        family = options.family or ("sd3" if options.size == "tiny" else family_of(options.size))
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = traced(family, options, device)
    except ValueError as error:
        parser.error(f"--blocks_to_swap: {error}")
    swap, trace = model.swap, model.trace
    for _ in range(options.warmup):
        model.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trace.clear()
    shown: list[Turn] = []
    for _ in range(options.steps):
        before = len(trace.turns(swap.numbers))
        model.step()
        shown = trace.turns(swap.numbers)[before:]
    told = facts(trace, options.steps, device)
    print(
        f"{len(swap.numbers)} of {model.blocks} blocks, {swap.host_bytes / _MIB:,.1f} MiB, are on the host and take "
        f"turns in {swap.device_bytes / _MIB:,.1f} MiB; the last of {options.steps} steps:"
    )
    print("\n".join(timeline(shown)))
    for name, value in told.items():
        print(f"{name}: {value:,.3f}")
    if options.json:
        rows = [dataclasses.asdict(turn) for turn in shown]
        options.json.write_text(json.dumps({"command": " ".join(sys.argv), **told, "turns": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
