"""Encodes the pictures (and captions) of the next micro-batch while the step computes the present one."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from library.records import Batch, TensorRecord


def encode_ahead(
    batches: Generator[Batch, None, None], encode: Callable[[Batch], Batch], device: torch.device
) -> Generator[Batch, None, None]:
    """This encodes each batch in a thread while the one before is in use, one ahead.

    Batches are taken from ``batches`` on the caller's thread while the other one rests: reader processes may be started
    there, and a plan is not made for two threads. What goes wrong with a batch is raised as it is, when that batch is
    asked for. Closing the generator waits for the thread and closes ``batches``.

    Args:
        batches: The batches, in host memory; page-locked where the device is a GPU.
        encode: Gives a batch with its pictures encoded, on the device. It must depend on nothing that the caller
            changes meanwhile, torch's generators included.
        device: Where the caller computes. On a GPU, encoding has a stream of its own.
    """
    stream = _new_stream(device)

    def encode_in_stream(batch: Batch) -> Batch:
        with torch.cuda.stream(stream):  # does nothing without one
            return encode(batch)

    # Where the outermost autocast of any thread ends, torch forgets the weights that autocast has cast, in all threads.
    # One more level in this thread keeps those of the step that is computed meanwhile.
    prepare = torch.autocast_increment_nesting
    with contextlib.closing(batches), ThreadPoolExecutor(1, "encode", initializer=prepare) as thread:
        upcoming = _begin(batches, encode_in_stream, thread)
        while upcoming is not None:
            batch = upcoming.result()
            if stream is not None:
                _hand_over(batch, stream)
            upcoming = _begin(batches, encode_in_stream, thread)
            yield batch


def _begin(
    batches: Iterator[Batch], encode: Callable[[Batch], Batch], thread: ThreadPoolExecutor
) -> "Future[Batch] | None":
    """The next batch on its way, or None after the last. What goes wrong waits until the batch is asked for."""
    try:
        batch = next(batches)
    except StopIteration:
        return None
    except Exception as error:
        failed: Future[Batch] = Future()
        failed.set_exception(error)
        return failed
    return thread.submit(encode, batch)


def _new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream that begins after all that the device was asked for so far; None where there are no streams."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _hand_over(batch: Batch, stream: torch.cuda.Stream) -> None:
    """Let the caller's stream wait for the batch, and keep its memory until that stream is through with it."""
    user = torch.cuda.current_stream(stream.device)
    user.wait_stream(stream)
    for tensor in _tensors(batch):
        if tensor.is_cuda:
            tensor.record_stream(user)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, TensorRecord):
            yield from value.tensors().values()
        elif isinstance(value, Tensor):
            yield value
