"""What steps would take on a GPU, foreseen from shapes alone: no GPU and no weights are needed.

python -m bench.forecast --size sd3.5-large
python -m bench.forecast --size sana-1.6b --full --memory gradient_checkpointing=true fused_backward_pass=true

It runs the trainer's forecast at a published size in bf16, for the documentation's list of settings or for those given;
each ``--memory`` is a row. CUDA itself takes about 0.5 GiB more.
"""

import argparse
import sys
from typing import Any

from bench.memory_options import described, given, table
from bench.synthetic_run import Setting, block_count, family_of, foresee
from library.config.errors import ConfigError
from library.config.memory import MemoryConfig

GIB = 2**30
STREAMED = ("x_mod_dim=0", "context_mod_dim=0")
"""``--network_args`` of an adapter that leaves modulation alone, so that it may stream."""


def streaming(blocks: int) -> list[dict[str, Any]]:
    """Rows for models whose modulation may stream."""
    all_away = {"gradient_checkpointing": True, "blocks_to_swap": blocks, "stream_modulation": True}
    return [
        all_away,
        {**all_away, "cpu_offload_checkpointing": True},
        {**all_away, "base_model_precision": "int8"},
    ]


def main() -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="sd3.5-medium", help="a published size")
    parser.add_argument("--resolution", type=int, default=1024, help="pixels per side")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--full", action="store_true", help="all weights are trained, in fp32, instead of an adapter")
    parser.add_argument("--memory", nargs="*", action="append", metavar="NAME=VALUE", help="a row with these options")
    options = parser.parse_args()
    try:
        family = family_of(options.size)
        blocks = block_count(family, options.size)
        rows = [given(words) for words in options.memory or ()] or list(table(blocks, full=options.full))
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    if not options.memory and family == "sd3" and not options.full:
        rows += streaming(blocks)
    print("| memory | GiB | TFLOP per step | to the device, GiB | to the host, GiB | waits on the host, GiB |")
    print("|---|---|---|---|---|---|")
    for values in rows:
        memory = MemoryConfig(**values)
        if memory.torch_compile:
            continue  # foreseen as if it weren't compiled
        setting = Setting(
            family,
            options.size,
            options.resolution,
            options.batch_size,
            None if options.full else options.rank,
            "bf16",
            memory,
            network_args=STREAMED if memory.stream_modulation else (),
        )
        try:
            found = foresee(setting, cuda=True)
        except ConfigError as error:
            print(f"| {described(memory)}: {error} | | | | | |")
            continue
        numbers = (found.peak / GIB, found.operations / 1e12, found.up / GIB, found.down / GIB, found.host / GIB)
        print(f"| {described(memory)} | {' | '.join(f'{number:.2f}' for number in numbers)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
