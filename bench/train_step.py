"""One training step: time, arithmetic and memory, for any family at any size, with random weights made on the device.

python -m bench.train_step --size sd3.5-medium --resolution 1024 --batch_size 4 --rank 16 --precision bf16
python -m bench.train_step --size sana-1.6b --resolution 1024 --batch_size 4 --full --precision bf16
python -m bench.train_step --family sana --size tiny --resolution 512 --batch_size 2 --precision no --plain

It runs the trainer's own step (forward, backward, clipping, AdamW, schedule) on cached latents and text features, once
without and once with gradient checkpointing. ``--plain`` runs a bare loop over the same model beside it, in turn, and
prints the ratio.
"""

import argparse
import itertools
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.synthetic_run import SyntheticRun, family_of, make_run
from library.families import FAMILIES
from library.training.loop import optimize

COLUMNS = (
    ("checkpointing", "{}"),
    ("tokens", "{}"),
    ("tflop_per_sample", "{:.4g}"),
    ("seconds_per_step", "{:.4f}"),
    ("samples_per_second", "{:.3f}"),
    ("tflops", "{:.3f}"),
    ("share_of_matmul", "{:.1%}"),
    ("peak_gib", "{:.2f}"),
)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The device's measured rate for a large matrix product of random numbers, in FLOP per second."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    best = statistics.median(timed(lambda: left @ right, device) for _ in range(10))
    return 2 * side**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU since the last reset, or the most that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(synthetic: SyntheticRun, *, steps: int, warmup: int, rate: float, plain: bool) -> dict[str, Any]:
    """Time the step, and the bare loop in turn with it."""
    run, device = synthetic.run, synthetic.run.device
    numbers = itertools.count()

    def step() -> None:
        optimize(run, next(numbers))

    for _ in range(warmup):
        step()
        if plain:
            synthetic.plain_step()
    with FlopCounterMode(display=False) as counter:
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ours, bare = [], []
    for _ in range(steps):
        ours.append(timed(step, device))
        if plain:
            bare.append(timed(synthetic.plain_step, device))
    median = statistics.median(ours)
    flops = counter.get_total_flops()
    result = {
        "tokens": synthetic.tokens,
        "tflop_per_sample": flops / synthetic.batch_size / 1e12,
        "seconds_per_step": median,
        "samples_per_second": synthetic.batch_size / median,
        "tflops": flops / median / 1e12,
        "share_of_matmul": flops / median / rate,
        "peak_gib": peak_memory(device) / 2**30,
    }
    if plain:
        result["plain_seconds_per_step"] = statistics.median(bare)
        result["ratio_to_plain"] = statistics.median(own / other for own, other in zip(ours, bare))
    return result


def main() -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), help="by default the one that has the size; tiny: sd3")
    parser.add_argument("--size", default="tiny", help="a published size of the family, or tiny (default)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels per side")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--full", action="store_true", help="train all weights, in fp32, instead of an adapter")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="a bare loop over the same model beside it")
    parser.add_argument("--checkpointing", choices=("both", "on", "off"), default="both")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    try:
        family = options.family or ("sd3" if options.size == "tiny" else family_of(options.size))
    except ValueError as error:
        parser.error(str(error))

    rows = []
    modes = {"both": (False, True), "on": (True,), "off": (False,)}[options.checkpointing]
    facts: dict[str, Any] = {}
    for checkpointing in modes:
        synthetic = make_run(
            family,
            options.size,
            resolution=options.resolution,
            batch_size=options.batch_size,
            rank=options.rank,
            precision=options.precision,
            checkpointing=checkpointing,
            full=options.full,
        )
        device = synthetic.run.device
        rate = matmul_rate(device, synthetic.run.weight_dtype)
        facts = {
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "command": " ".join(sys.argv),
            "parameters": synthetic.parameters,
            "trained": sum(parameter.numel() for parameter in synthetic.run.parameters),
            "matmul_tflops": rate / 1e12,
        }
        row = measure(synthetic, steps=options.steps, warmup=options.warmup, rate=rate, plain=options.plain)
        rows.append({"checkpointing": "on" if checkpointing else "off", **row})
        del synthetic
    for name, value in facts.items():
        print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    columns = [*COLUMNS, ("plain_seconds_per_step", "{:.4f}"), ("ratio_to_plain", "{:.3f}")][
        : None if options.plain else -2
    ]
    print(" | ".join(name for name, _ in columns))
    for row in rows:
        print(" | ".join(form.format(row[name]).rjust(len(name)) for name, form in columns))
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
