"""What block swap does in a step, turn by turn: what is on the device, what travels meanwhile, and who waits for it.

python -m bench.swap_trace --size tiny --blocks_to_swap 2 [--full] [--checkpointing] [--json trace.json]

The model has random weights. On a GPU the copies are real and timed by the device itself; elsewhere they are made on
the host at once, and what is shown is their order and what is resident.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.synthetic_run import family_of, make_run
from library.config.memory import MemoryConfig
from library.families import FAMILIES
from library.memory.block_swap import BlockSwap
from library.memory.checkpointing import enable_checkpointing
from library.memory.transfer_trace import TransferTrace, Turn
from library.memory.transfers import CudaTransfers, Transfers
from library.training.loop import optimize
from library.training.run import Run
from library.training.updates import prepare_updates

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


def swap_blocks(run: Run, count: int, *, checkpointing: bool) -> tuple[BlockSwap, TransferTrace]:
    """Let blocks of a run's denoiser take turns, as placing does, and write down what happens."""
    blocks = list(run.family.blocks(run.denoiser))
    inner: Transfers = CudaTransfers(run.device) if run.device.type == "cuda" else HostTransfers()
    trace = TransferTrace(inner)
    swap = BlockSwap(blocks, count, trace, checkpointed=range(len(blocks)) if checkpointing else ())
    if checkpointing:
        enable_checkpointing(blocks, 1)
    if swap.trained:
        fused = MemoryConfig(blocks_to_swap=count, gradient_checkpointing=checkpointing, fused_backward_pass=True)
        unclipped = dataclasses.replace(run.config.optimizer, max_grad_norm=0.0)
        run.config = dataclasses.replace(run.config, memory=fused, optimizer=unclipped)
        run.swap = swap
        prepare_updates(run)
    return swap, trace


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
    run = make_run(
        family,
        options.size,
        resolution=options.resolution,
        batch_size=options.batch_size,
        rank=options.rank,
        precision=options.precision,
        checkpointing=False,  # it must wrap what swaps
        full=options.full,
    ).run
    blocks = len(run.family.blocks(run.denoiser))
    if not 0 < options.blocks_to_swap <= blocks:
        parser.error(f"--blocks_to_swap {options.blocks_to_swap}: the model has {blocks} blocks")
    swap, trace = swap_blocks(run, options.blocks_to_swap, checkpointing=options.checkpointing)
    numbers = itertools.count()
    for _ in range(options.warmup):
        optimize(run, next(numbers))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    trace.clear()
    shown: list[Turn] = []
    for _ in range(options.steps):
        before = len(trace.turns(swap.numbers))
        optimize(run, next(numbers))
        shown = trace.turns(swap.numbers)[before:]
    told = facts(trace, options.steps, run.device)
    print(
        f"{len(swap.numbers)} of {blocks} blocks, {swap.host_bytes / _MIB:,.1f} MiB, are on the host and take turns in "
        f"{swap.device_bytes / _MIB:,.1f} MiB; the last of {options.steps} steps:"
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
