"""Copies of weights between the host and a device, beside what the device computes."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from library.memory.pinned import pinned_buffer


class Transfers(Protocol):
    """Where swapped weights lie, and how they travel."""

    def host_buffer(self, size: int) -> Tensor:
        """So many bytes on the host, uint8, from which copies are fast."""
        ...

    def device_buffer(self, size: int) -> Tensor:
        """So many bytes on the device, uint8."""
        ...

    def fetch(self, source: Tensor, target: Tensor, slot: int) -> None:
        """This begins to copy to a slot, once what was computed up to now no longer needs the slot's old content.

        What was sent home from the slot has left it by then, and what was sent home to ``source`` is there.
        """
        ...

    def wait(self, slot: int) -> None:
        """What is computed from now on sees what was fetched into the slot, and may change what was sent home of it."""
        ...

    def send_home(self, source: Tensor, target: Tensor, slot: int) -> None:
        """This begins to copy a slot to the host, once what was computed up to now is done."""
        ...

    def wait_home(self) -> None:
        """When this returns, everything that was sent home is there."""
        ...


class CudaTransfers:
    """``Transfers`` to a CUDA device: pinned memory, two streams, and events. The host waits in ``wait_home`` alone.

    A link carries both ways at once, so there is a stream for each.

    Attributes:
        device: The device.
        to_device: The stream of what is fetched.
        to_host: The stream of what is sent home.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.to_device, self.to_host = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._arrived: dict[int, torch.cuda.Event] = {}  # by slot
        self._left: dict[int, torch.cuda.Event] = {}  # by slot
        self._home: dict[int, torch.cuda.Event] = {}  # by the address of the copy on the host

    def host_buffer(self, size: int) -> Tensor:
        """See ``Transfers``."""
        return pinned_buffer(size)

    def device_buffer(self, size: int) -> Tensor:
        """See ``Transfers``."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def fetch(self, source: Tensor, target: Tensor, slot: int) -> None:
        """See ``Transfers``."""
        self.line_up(source, slot)
        with torch.cuda.stream(self.to_device):
            target.copy_(source, non_blocking=True)
        self._arrived[slot] = self.to_device.record_event()

    def line_up(self, source: Tensor, slot: int) -> None:
        """What comes to the device from now on waits until the slot may be filled, and its host copy be read."""
        self.to_device.wait_stream(torch.cuda.current_stream(self.device))
        for event in (self._left.get(slot), self._home.get(source.data_ptr())):
            if event is not None:
                self.to_device.wait_event(event)

    def wait(self, slot: int) -> None:
        """See ``Transfers``."""
        for event in (self._arrived.get(slot), self._left.get(slot)):
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)

    def send_home(self, source: Tensor, target: Tensor, slot: int) -> None:
        """See ``Transfers``."""
        self.to_host.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.to_host):
            target.copy_(source, non_blocking=True)
        self._left[slot] = self._home[target.data_ptr()] = self.to_host.record_event()

    def wait_home(self) -> None:
        """See ``Transfers``."""
        self.to_host.synchronize()


@dataclass
class Stashed:
    """A tensor on the host, and on the device once it is on its way back."""

    buffer: Tensor
    shape: torch.Size
    dtype: torch.dtype
    tensor: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class CudaStash:
    """``library.memory.activation_offload.Stash`` for a CUDA device; the host never waits.

    All copies are made one after the other on a stream of their own, so a buffer on the host may be used anew as soon
    as its copy back has been asked for.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._free: dict[int, list[Tensor]] = {}

    def put(self, tensor: Tensor) -> Stashed:
        """See ``Stash``."""
        free = self._free.get(tensor.nbytes)
        buffer = free.pop() if free else torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is given to nobody else before it has left
        return Stashed(buffer, tensor.shape, tensor.dtype)

    def send_for(self, kept: Stashed) -> None:
        """See ``Stash``."""
        if kept.tensor is not None:
            return
        kept.tensor = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            kept.tensor.copy_(kept.buffer.view(kept.dtype).view(kept.shape), non_blocking=True)
            kept.arrived = torch.cuda.Event()
            kept.arrived.record(self._stream)
        kept.tensor.record_stream(self._stream)
        self._free.setdefault(kept.buffer.numel(), []).append(kept.buffer)

    def take(self, kept: Stashed) -> Tensor:
        """See ``Stash``."""
        self.send_for(kept)
        assert kept.tensor is not None and kept.arrived is not None
        torch.cuda.current_stream(self._device).wait_event(kept.arrived)
        return kept.tensor
