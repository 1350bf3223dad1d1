"""Several processes on gloo, forked from this one, so that none of them has to import anything."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any


def in_processes(count: int, act: Callable[[int], Any], *, seconds: float = 100) -> list[Any]:
    """What ``act`` makes of each rank, in so many processes that accelerate takes for a launch."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ends, processes = [], []
    for rank in range(count):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(act, rank, count, port, there))
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    results = []
    try:
        for rank, end in enumerate(ends):
            assert end.poll(seconds), f"process {rank} of {count} is silent"
            ok, result = pickle.loads(end.recv_bytes())
            assert ok, f"process {rank} of {count}:\n{result}"
            results.append(result)
    finally:
        for process in processes:
            process.join(10 if len(results) == count else 1)
            if process.is_alive():
                process.kill()
    return results


def _run(act: Callable[[int], Any], rank: int, count: int, port: int, end: Any) -> None:
    os.environ |= {
        "ACCELERATE_USE_CPU": "true",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)  # a pool of threads doesn't survive the fork
    try:
        answer = (True, act(rank))
    except BaseException:
        answer = (False, traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        end.send_bytes(pickle.dumps(answer))  # whole: tensors would be sent as files that end with this process
    end.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not through pytest's own ending
