"""Weights in one buffer on the host, from which a copy moves them all at once."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory.transfers import Transfers

_ALIGNMENT = 256  # of each tensor in its buffer, in bytes: what kernels load in one piece


@dataclass(frozen=True)
class _Place:
    tensor: Tensor
    begin: int
    dtype: torch.dtype
    shape: torch.Size

    def view(self, buffer: Tensor) -> Tensor:
        length = self.shape.numel() * self.dtype.itemsize
        return buffer[self.begin : self.begin + length].view(self.dtype).view(self.shape)


class PackedWeights:
    """Tensors whose data lie in a buffer on the host, or in a copy of it.

    Args:
        tensors: Parameters and buffers of modules; they lie on the host afterwards.
        transfers: Makes the buffer.

    Attributes:
        master: The buffer on the host.
        trained: Those of the tensors that are trained.
    """

    def __init__(self, tensors: Iterable[Tensor], transfers: Transfers):
        self._places, begin = list[_Place](), 0
        for tensor in tensors:
            self._places.append(_Place(tensor, begin, tensor.dtype, tensor.shape))
            begin += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.master = transfers.host_buffer(begin)
        for place in self._places:
            place.view(self.master).copy_(place.tensor.data)
        self.trained = [place.tensor for place in self._places if place.tensor.requires_grad]
        self.go_home()

    @property
    def tensors(self) -> list[Tensor]:
        """Those it was made of."""
        return [place.tensor for place in self._places]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.master.numel()

    def lie_in(self, buffer: Tensor) -> None:
        """Let the tensors' data be those in ``buffer`` (size,), uint8, wherever it is."""
        for place in self._places:
            place.tensor.data = place.view(buffer)

    def go_home(self) -> None:
        """Let the tensors' data be those on the host."""
        self.lie_in(self.master)

    def stand_in(self, device: torch.device) -> None:
        """Let the tensors seem to lie on a device: shape and type are theirs, the memory is that of one number."""
        for place in self._places:
            place.tensor.data = torch.empty((), dtype=place.dtype, device=device).expand(place.shape)
