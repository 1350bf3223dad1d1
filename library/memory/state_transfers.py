"""Copies of the optimizer's state between the host and a device, both ways, beside what the device computes."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from library.memory.pinned import pinned_buffer

Copies = Sequence[tuple[Tensor, Tensor]]
"""Pairs of tensors: from where, to where."""


class StateTransfers(Protocol):
    """Where state lies, and how it travels."""

    def host_tensor(self, like: Tensor) -> Tensor:
        """A tensor on the host of this shape, strides and type, without numbers, to and from which copies are fast."""
        ...

    def device_buffer(self, size: int) -> Tensor:
        """So many bytes on the device, uint8."""
        ...

    def fetch(self, owner: int, copies: Copies, slot: int) -> None:
        """This begins to copy an owner's tensors into a slot, once they are home and the slot's old content is."""
        ...

    def wait(self, slot: int) -> None:
        """What is computed from now on sees what was fetched into the slot, and may write to it."""
        ...

    def send_home(self, owner: int, copies: Copies, slot: int) -> None:
        """This begins to copy from a slot to an owner's tensors on the host what is computed up to now."""
        ...

    def settle(self) -> None:
        """The host waits until all copies are done."""
        ...


class CudaStateTransfers:
    """``StateTransfers`` for a CUDA device: pinned memory, a stream for each direction, and events."""

    def __init__(self, device: torch.device):
        self._device = device
        self._coming, self._going = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._arrived: dict[int, torch.cuda.Event] = {}  # by slot
        self._left: dict[int, torch.cuda.Event] = {}  # by slot
        self._home: dict[int, torch.cuda.Event] = {}  # by owner
        # what a tensor on the host lies in is pinned as long as it is held
        self._buffers = WeakTensorKeyDictionary()

    def host_tensor(self, like: Tensor) -> Tensor:
        """See ``StateTransfers``."""
        numbers = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride()))
        buffer = pinned_buffer(numbers * like.dtype.itemsize)
        tensor = buffer.view(like.dtype).as_strided(like.shape, like.stride())
        self._buffers[tensor] = buffer
        return tensor

    def device_buffer(self, size: int) -> Tensor:
        """See ``StateTransfers``."""
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        for stream in (self._coming, self._going):  # what had this memory before may still be computing
            stream.wait_stream(torch.cuda.current_stream(self._device))
        return buffer

    def fetch(self, owner: int, copies: Copies, slot: int) -> None:
        """See ``StateTransfers``."""
        for event in (self._home.get(owner), self._left.get(slot)):
            if event is not None:
                self._coming.wait_event(event)
        self._arrived[slot] = self._copy(copies, self._coming)

    def wait(self, slot: int) -> None:
        """See ``StateTransfers``."""
        for event in (self._arrived.get(slot), self._left.get(slot)):
            if event is not None:
                torch.cuda.current_stream(self._device).wait_event(event)

    def send_home(self, owner: int, copies: Copies, slot: int) -> None:
        """See ``StateTransfers``."""
        self._going.wait_stream(torch.cuda.current_stream(self._device))
        self._home[owner] = self._left[slot] = self._copy(copies, self._going)

    def settle(self) -> None:
        """See ``StateTransfers``."""
        self._coming.synchronize()
        self._going.synchronize()

    def _copy(self, copies: Copies, stream: torch.cuda.Stream) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            for source, target in copies:
                target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return done
