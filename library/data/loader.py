"""Planned micro-batches -> batches, read ahead of the training by threads or processes.

What a batch holds depends on its description alone, never on which worker made it or what was read before.
"""

import itertools
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from library.config.errors import ConfigError
from library.data.batch_reader import BatchReader
from library.data.plan import MicroBatch
from library.io import places
from library.records import Batch

__all__ = ["BatchReader", "make_loader"]

AHEAD = 2  # batches per worker that are read or wait to be used


def make_loader(
    reader: BatchReader,
    micro_batches: Iterable[MicroBatch],
    *,
    workers: int = 0,
    persistent: bool = True,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Generator[Batch, None, None]:
    """This reads batches ahead, in the order of the micro-batches. The batches are the same at any worker count.

    Cached latents are read by threads: there is little to compute, and handing tensors from one process to another
    takes several times as long as reading them. Pictures are decoded by processes.

    Args:
        reader: Makes one batch.
        micro_batches: What to read; taken lazily, on the caller's thread.
        workers: Threads or processes that read; 0 reads in this thread, when a batch is asked for.
        persistent: Whether processes live on from epoch to epoch.
        pin_memory: Whether batches lie in page-locked memory.
        start_method: How processes start (``fork``, ``spawn``, ``forkserver``); by default as the platform does it, or
            as remote files need it.

    Raises:
        ConfigError: Something of a sample can't be read.
    """
    if workers and reader.latents is not None:
        yield from _by_threads(reader, iter(micro_batches), workers, pin_memory=pin_memory)
        return
    epochs: Iterable[Iterable[MicroBatch]] = [micro_batches]
    if not persistent and workers:
        epochs = (group for _, group in itertools.groupby(micro_batches, key=lambda micro_batch: micro_batch.epoch))
    for part in epochs:
        loader = DataLoader(
            _Readable(reader),
            batch_size=None,
            sampler=part,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            pin_memory=pin_memory,
            multiprocessing_context=(start_method or places.start_method()) if workers else None,
            worker_init_fn=_start_process,
        )
        for item in loader:
            if isinstance(item, _Failure):
                raise ConfigError(item.message)
            yield item


def _by_threads(
    reader: BatchReader, micro_batches: Iterator[MicroBatch], workers: int, *, pin_memory: bool
) -> Generator[Batch, None, None]:
    # page-locked memory belongs to a device, and which one is current is each thread's own affair
    device = torch.cuda.current_device() if pin_memory else None

    def start_thread() -> None:
        if device is not None:
            torch.cuda.set_device(device)

    def read(micro_batch: MicroBatch) -> Batch:
        batch = _read(reader, micro_batch)
        return batch.pin_memory() if pin_memory else batch

    with ThreadPoolExecutor(workers, "loader", initializer=start_thread) as threads:
        try:
            ahead = itertools.islice(micro_batches, AHEAD * workers)
            waiting = deque(threads.submit(read, micro_batch) for micro_batch in ahead)
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(threads.submit(read, micro_batch) for micro_batch in itertools.islice(micro_batches, 1))
                yield batch
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _read(reader: BatchReader, micro_batch: MicroBatch) -> Batch:
    try:
        return reader(micro_batch)
    except ConfigError:
        raise
    except Exception as error:
        keys = ", ".join(reader.samples[visit.sample].key for visit in micro_batch.visits)
        raise RuntimeError(
            f"step {micro_batch.step}: no batch of the samples {keys}: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class _Failure:
    """What a process says instead of a batch, so that the message arrives without the process's traceback."""

    message: str


@dataclass(frozen=True)
class _Readable(Dataset["Batch | _Failure"]):
    reader: BatchReader

    def __getitem__(self, micro_batch: MicroBatch) -> "Batch | _Failure":
        try:
            return _read(self.reader, micro_batch)
        except ConfigError as error:
            return _Failure(str(error))


def _start_process(_: int) -> None:
    # A signal to the whole process group (Ctrl-C, a cluster's warning) is for the training process, which finishes its
    # step and saves; a worker that died of it would end the run before. SIGTERM stays as torch has set it: that is how
    # the training process ends its workers.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism; and tokenizers warn after a fork
