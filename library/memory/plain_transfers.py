"""``Transfers``, ``StateTransfers`` and ``Stash`` by plain copies that count: for forecasts, benches and tests."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory.state_transfers import Copies


@dataclass
class Traffic:
    """Bytes that travel between host and device, and that wait on the host.

    Attributes:
        up: To the device.
        down: To the host.
        waiting: Of buffers on the host that are in use.
        host: The most of them at once.
    """

    up: int = 0
    down: int = 0
    waiting: int = 0
    host: int = 0

    def wait(self, size: int) -> None:
        """Note that so many bytes are in use on the host, or with a negative number that they aren't any more."""
        self.waiting += size
        self.host = max(self.host, self.waiting)


class PlainTransfers:
    """``library.memory.transfers.Transfers``: copies that have arrived when they return.

    Args:
        traffic: Counts them.
        on_host: Is told what lies on the host.
    """

    def __init__(self, traffic: Traffic, on_host: Callable[[Tensor], None]):
        self._traffic, self._on_host = traffic, on_host

    def host_buffer(self, size: int) -> Tensor:
        """See ``Transfers``."""
        buffer = torch.empty(size, dtype=torch.uint8)
        self._on_host(buffer)
        self._traffic.wait(size)
        return buffer

    def device_buffer(self, size: int) -> Tensor:
        """See ``Transfers``."""
        return torch.empty(size, dtype=torch.uint8)

    def fetch(self, source: Tensor, target: Tensor, slot: int) -> None:
        """See ``Transfers``."""
        target.copy_(source)
        self._traffic.up += source.nbytes

    def wait(self, slot: int) -> None:
        """See ``Transfers``: it has arrived."""

    def send_home(self, source: Tensor, target: Tensor, slot: int) -> None:
        """The other way."""
        target.copy_(source)
        self._traffic.down += source.nbytes

    def wait_home(self) -> None:
        """It has arrived."""


class PlainStateTransfers:
    """``library.memory.state_transfers.StateTransfers`` in the same way; see ``PlainTransfers``."""

    def __init__(self, traffic: Traffic, on_host: Callable[[Tensor], None]):
        self._traffic, self._on_host = traffic, on_host

    def host_tensor(self, like: Tensor) -> Tensor:
        """See ``StateTransfers``."""
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        self._on_host(tensor)
        self._traffic.wait(tensor.nbytes)
        return tensor

    def device_buffer(self, size: int) -> Tensor:
        """See ``StateTransfers``."""
        return torch.empty(size, dtype=torch.uint8)

    def fetch(self, owner: int, copies: Copies, slot: int) -> None:
        """See ``StateTransfers``."""
        self._traffic.up += _copied(copies)

    def wait(self, slot: int) -> None:
        """See ``StateTransfers``: it has arrived."""

    def send_home(self, owner: int, copies: Copies, slot: int) -> None:
        """See ``StateTransfers``."""
        self._traffic.down += _copied(copies)

    def settle(self) -> None:
        """See ``StateTransfers``: all are done."""


def _copied(copies: Copies) -> int:
    """Make the copies; returns their bytes."""
    for source, target in copies:
        target.copy_(source)
    return sum(source.nbytes for source, _ in copies)


@dataclass
class _Kept:
    copy: Tensor | None
    tensor: Tensor | None = None


class PlainStash:
    """``library.memory.activation_offload.Stash`` in the same way; see ``PlainTransfers``."""

    def __init__(self, traffic: Traffic, on_host: Callable[[Tensor], None]):
        self._traffic, self._on_host = traffic, on_host

    def put(self, tensor: Tensor) -> _Kept:
        """See ``Stash``."""
        copy = tensor.clone()
        self._on_host(copy)
        self._traffic.down += copy.nbytes
        self._traffic.wait(copy.nbytes)
        return _Kept(copy)

    def send_for(self, kept: _Kept) -> None:
        """See ``Stash``."""
        if kept.copy is not None:
            kept.tensor = kept.copy.clone()
            self._traffic.up += kept.copy.nbytes
            self._traffic.wait(-kept.copy.nbytes)
            kept.copy = None

    def take(self, kept: _Kept) -> Tensor:
        """See ``Stash``."""
        self.send_for(kept)
        assert kept.tensor is not None
        return kept.tensor
