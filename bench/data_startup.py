"""One start of the data side in a process of its own: scan, sizes, captions, buckets, plan. Prints JSON.

python -m bench.data_startup FOLDER INDEX
"""

import json
import sys
import time
from pathlib import Path

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.buckets import place_all
from library.data.discovery import discover
from library.data.file_index import FileIndex
from library.data.plan import BatchPlan
from library.records import Resolution


def resident_bytes() -> int:
    """What the process holds in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system doesn't say how much memory the process has")


def main() -> None:
    """Time one start."""
    folder, index = sys.argv[1:]
    dataset = DatasetConfig(resolution=Resolution(1024, 1024), batch_size=4, subsets=(SubsetConfig(image_dir=folder),))
    before = resident_bytes()
    times = {}

    def timed(name: str, started: float) -> float:
        now = time.perf_counter()
        times[name] = now - started
        return now

    started = now = time.perf_counter()
    discovery = discover((dataset,), FileIndex(index))
    now = timed("discovery", now)
    placements = place_all(discovery.samples, (dataset,), 16)
    now = timed("buckets", now)
    plan = BatchPlan(discovery.samples, placements, (dataset,), seed=1, micro_batches_per_step=1)
    plan.step(0)
    now = timed("plan", now)
    times["total"] = now - started
    print(json.dumps({**times, "memory": resident_bytes() - before, "samples": len(discovery.samples)}))


if __name__ == "__main__":
    main()
