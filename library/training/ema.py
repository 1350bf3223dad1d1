"""An exponential moving average of the trained weights (Polyak and Juditsky 1992)."""

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from library.memory.block_swap import BlockSwap
from library.training.shards import own_part


class WeightAverage:
    """The average of named parameters over the optimizer's updates, in fp32.

    Args:
        parameters: What is averaged, by name. The average begins with their values.
        decay: How much of the average stays at an update, once it has settled.
        on_host: Keep it in host memory, where a thread updates it from a copy of the parameters while the device
            computes the next step; otherwise beside the parameters, which takes no copy.
        swap: Takes some of them to and fro between host and device; None: they stay.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, *, on_host: bool, swap: BlockSwap | None = None
    ):
        self._parameters, self._swap = dict(parameters), swap
        self._decay = decay
        self.updates = 0
        self._averages = {
            name: part.to(self._home_of(part, on_host=on_host), torch.float32, copy=True)
            for name, part in self._own_parts().items()
        }
        self._staged = {name: self._stage(name) for name in parameters} if on_host else {}
        self._thread = ThreadPoolExecutor(1, "average") if on_host else None
        self._pending: Future[None] | None = None

    @property
    def next_decay(self) -> float:
        """How much of the average stays at the next update: little at first, so that the start is soon forgotten."""
        return min((1 + self.updates) / (10 + self.updates), self._decay)

    @torch.no_grad()
    def update(self) -> None:
        """This takes the parameters' present values in."""
        self._settle()
        share = 1 - self.next_decay
        self.updates += 1
        if self._thread is None:
            _blend(self._averages, self._own_parts(), share)
            return
        arrived = self._copy_out()
        self._pending = self._thread.submit(self._take_in, share, arrived)

    def tensors(self) -> dict[str, Tensor]:
        """The average by name, fp32; of weights that are spread over processes, this one's part."""
        self._settle()
        return dict(self._averages)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """This puts the average back to where it was saved."""
        self._settle()
        for name, average in self._averages.items():
            average.copy_(tensors[name])
        self.updates = updates

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the parameters have the average's values; afterwards their own again, bit for bit.

        With the average on the host the parameters' own values wait there too, so that the device holds one set.
        """
        self._settle()
        if self._thread is None:
            with self._shown_beside():
                yield
            return
        arrived = self._copy_out()
        if arrived is not None:
            arrived.synchronize()
        self._put_in(self._averages)
        try:
            yield
        finally:
            self._put_in(self._staged)

    def close(self) -> None:
        """This ends the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    @contextlib.contextmanager
    def _shown_beside(self) -> Iterator[None]:
        sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters.values())
        if sharded or self._swap is not None:
            # what gathers them, or brings them to the device, reads their memory: the values must change there
            parts = {name: part.clone() for name, part in self._own_parts().items()}
            self._put_in(self._averages)
            try:
                yield
            finally:
                self._put_in(parts)
            return
        kept = {name: parameter.data for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self._averages[name].to(parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]

    def _stage(self, name: str) -> Tensor:
        part = own_part(self._parameters[name])
        return torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)

    def _home_of(self, part: Tensor, *, on_host: bool) -> torch.device:
        if on_host:
            return torch.device("cpu")
        return part.device if self._swap is None else self._swap.device

    def _own_parts(self) -> dict[str, Tensor]:
        if self._swap is not None:
            self._swap.come_home()
        return {name: own_part(parameter) for name, parameter in self._parameters.items()}

    def _copy_out(self) -> torch.cuda.Event | None:
        """Starts the copy of the parameters to the host; returns what tells that it is there, None if it is."""
        on_gpu = False
        for name, part in self._own_parts().items():
            # only a copy to pinned memory can be waited for; others must be there when copy_ returns
            self._staged[name].copy_(part, non_blocking=part.is_cuda)
            on_gpu = on_gpu or part.is_cuda
        return torch.cuda.current_stream().record_event() if on_gpu else None

    @torch.no_grad()
    def _put_in(self, values: Mapping[str, Tensor]) -> None:
        for name, part in self._own_parts().items():
            part.copy_(values[name])

    def _take_in(self, share: float, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        with torch.no_grad():
            _blend(self._averages, self._staged, share)

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def _blend(averages: Mapping[str, Tensor], values: Mapping[str, Tensor], share: float) -> None:
    for name, average in averages.items():
        average.lerp_(values[name].detach().to(average.device, torch.float32), share)
