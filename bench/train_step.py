"""One training step: time, arithmetic and memory, for any family at any size, with random weights made on the device.

python -m bench.train_step --size sd3.5-medium --resolution 1024 --batch_size 4 --rank 16 --precision bf16
python -m bench.train_step --size sd3.5-large --precision bf16 --memory blocks_to_swap=19 gradient_checkpointing=true
python -m bench.train_step --size sana-1.6b --resolution 1024 --batch_size 4 --full --precision bf16
python -m bench.train_step --size sd3.5-medium --resolution 1024 --batch_size 4 --precision bf16 --table step.md
python -m bench.train_step --family sana --size tiny --resolution 512 --batch_size 2 --precision no --plain

It runs the trainer's own step (forward, backward, clipping, optimizer, schedule) on cached latents and text features,
placed as the options say, once without and once with gradient checkpointing. ``--memory`` takes every option of the
group "Memory and speed" as ``name=value``; each use of ``--memory`` is a row of its own. ``--table FILE`` measures the
documentation's list instead, and writes it as Markdown. ``--plain`` runs a bare loop over the same model beside it, in
turn, and prints the ratio.

``foreseen_gib`` is what the trainer's forecast says before the step, ``counted_gib`` what there was: on a GPU
``torch.cuda.max_memory_allocated``, on the host the memory of all tensors as operations made them. The bytes that
travel per step are the forecast's. ``graphs`` is how often torch.compile compiled. On the host, weights and activations
that are to wait there travel all the same, by plain copies between memory that counts and memory that doesn't; what
compiled blocks take is counted on a GPU only.
"""

import argparse
import gc
import itertools
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.memory_options import described, given, table
from bench.synthetic_run import Setting, SyntheticRun, block_count, family_of, make_run
from library.config.errors import ConfigError
from library.config.memory import MemoryConfig
from library.config.training import TrainingConfig
from library.families import FAMILIES
from library.memory.allocations import Allocations
from library.memory.plain_transfers import Traffic
from library.training.loop import optimize
from library.training.trial import uncompiled

GIB = 2**30
COLUMNS = (
    ("memory", "{}"),
    ("tokens", "{}"),
    ("tflop_per_sample", "{:.4g}"),
    ("seconds_per_step", "{:.4f}"),
    ("samples_per_second", "{:.3f}"),
    ("tflops", "{:.3f}"),
    ("share_of_matmul", "{:.1%}"),
    ("foreseen_gib", "{:.3f}"),
    ("counted_gib", "{:.3f}"),
    ("foreseen_to_counted", "{:.3f}"),
    ("up_gib", "{:.2f}"),
    ("down_gib", "{:.2f}"),
    ("graphs", "{}"),
    ("process_gib", "{:.2f}"),
)
PLAIN_COLUMNS = (("plain_seconds_per_step", "{:.4f}"), ("ratio_to_plain", "{:.3f}"))


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


def process_memory(device: torch.device) -> int:
    """Bytes: the most that torch reserved on a GPU, or the most that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(setting: Setting, *, steps: int, warmup: int, rate: float | None, plain: bool) -> dict[str, Any]:
    """Count one step, then time the step, and the bare loop in turn with it; and facts of the run."""
    watched = "cuda" if torch.cuda.is_available() else "cpu"
    allocations, traffic = Allocations(watched), Traffic()
    synthetic = make_run(replace(setting, memory=uncompiled(setting.memory)), allocations, traffic)
    numbers = itertools.count()
    with allocations:
        optimize(synthetic.run, next(numbers))
        allocations.start("the step")
        optimize(synthetic.run, next(numbers))
    if setting.memory.torch_compile:  # what has once run while torch watched single operations is never compiled
        del synthetic
        gc.collect()
        synthetic = make_run(setting, Allocations(watched), Traffic())
    run, device = synthetic.run, synthetic.run.device

    def step() -> None:
        optimize(run, next(numbers))

    for _ in range(warmup):
        step()
        if plain:
            synthetic.plain_step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ours, bare = [], []
    for _ in range(steps):
        ours.append(timed(step, device))
        if plain:
            bare.append(timed(synthetic.plain_step, device))
    counted = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else allocations.peak
    rate = rate or matmul_rate(device, run.weight_dtype)
    return {
        **_row(synthetic, statistics.median(ours), allocations.operations, rate, counted),
        **(_plain_row(ours, bare) if plain else {}),
        "graphs": run.compiling.graphs if run.compiling is not None else 0,
        "process_gib": process_memory(device) / GIB,
        "matmul_tflops": rate / 1e12,
        "parameters": synthetic.parameters,
        "trained": sum(parameter.numel() for parameter in run.parameters),
    }


def _row(synthetic: SyntheticRun, seconds: float, operations: float, rate: float, counted: int) -> dict[str, Any]:
    forecast = synthetic.forecast
    return {
        "memory": described(synthetic.run.config.memory),
        "tokens": synthetic.tokens,
        "tflop_per_sample": operations / synthetic.batch_size / 1e12,
        "seconds_per_step": seconds,
        "samples_per_second": synthetic.batch_size / seconds,
        "tflops": operations / seconds / 1e12,
        "share_of_matmul": operations / seconds / rate,
        "foreseen_gib": forecast.peak / GIB,
        "counted_gib": counted / GIB,
        "foreseen_to_counted": forecast.peak / counted,
        "foreseen": {name: size / GIB for name, size in forecast.components.items()},
        "up_gib": forecast.up / GIB,
        "down_gib": forecast.down / GIB,
    }


def _plain_row(ours: list[float], bare: list[float]) -> dict[str, Any]:
    return {
        "plain_seconds_per_step": statistics.median(bare),
        "ratio_to_plain": statistics.median(own / other for own, other in zip(ours, bare)),
    }


def measure_all(
    setting: Setting, memories: Sequence[dict[str, Any]], *, steps: int, warmup: int, plain: bool
) -> list[dict[str, Any]]:
    """A row for each choice of memory options; what doesn't fit or can't work is a row that says so."""
    rows: list[dict[str, Any]] = []
    rate = None
    for values in memories:
        try:
            chosen = replace(setting, memory=MemoryConfig(**values))
            row = measure(chosen, steps=steps, warmup=warmup, rate=rate, plain=plain)
            rate = row["matmul_tflops"] * 1e12
        except (ConfigError, torch.cuda.OutOfMemoryError) as error:
            first = (str(error).splitlines() or ["out of memory"])[0]
            row = {"memory": " ".join(f"{name}={value}" for name, value in values.items()), "failed": first}
        rows.append(row)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def cells(row: dict[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    """A row as texts; what there is no number for is empty."""
    if "failed" in row:
        return [f"{row['memory']}: {row['failed']}", *[""] * (len(columns) - 1)]
    return [form.format(row[name]) for name, form in columns]


def markdown(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]]) -> str:
    """The rows as a table in Markdown."""
    lines = [[name.replace("_", " ") for name, _ in columns], ["---"] * len(columns)]
    lines += [cells(row, columns) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), help="by default the one that has the size; tiny: sd3")
    parser.add_argument("--size", default="tiny", help="a published size of the family, or tiny (default)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels per side")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--full", action="store_true", help="train all weights instead of an adapter")
    parser.add_argument("--full_bf16", action="store_true", help="with --full: keep them in bf16 instead of fp32")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--optimizer_type", default="AdamW")
    parser.add_argument("--optimizer_args", nargs="*", default=())
    parser.add_argument("--network_args", nargs="*", default=())
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="a bare loop over the same model beside it")
    parser.add_argument("--checkpointing", choices=("both", "on", "off"), default="both")
    parser.add_argument("--memory", nargs="*", action="append", metavar="NAME=VALUE", help="a row with these options")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure the documentation's list; write it here")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    try:
        family = options.family or ("sd3" if options.size == "tiny" else family_of(options.size))
        setting = Setting(
            family,
            options.size,
            options.resolution,
            options.batch_size,
            None if options.full else options.rank,
            options.precision,
            training=TrainingConfig(full_bf16=options.full_bf16, mixed_precision=options.precision),
            optimizer=options.optimizer_type,
            optimizer_args=options.optimizer_args,
            network_args=options.network_args,
        )
        switches = {"both": (False, True), "on": (True,), "off": (False,)}[options.checkpointing]
        memories = [{"gradient_checkpointing": switch} for switch in switches]
        if options.memory:
            memories = [given(words) for words in options.memory]
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    if options.table:
        memories = list(table(block_count(family, options.size), full=options.full))
    rows = measure_all(setting, memories, steps=options.steps, warmup=options.warmup, plain=options.plain)
    on_gpu = torch.cuda.is_available()
    done: dict[str, Any] = next((row for row in rows if "failed" not in row), {})
    facts: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
        **{name: done[name] for name in ("parameters", "trained", "matmul_tflops") if name in done},
    }
    for name, value in facts.items():
        print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    columns = [*COLUMNS, *(PLAIN_COLUMNS if options.plain else ())]
    print(" | ".join(name for name, _ in columns))
    for row in rows:
        print(" | ".join(text.rjust(len(name)) for text, (name, _) in zip(cells(row, columns), columns)))
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    if options.table:
        options.table.write_text(markdown(rows, columns))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
