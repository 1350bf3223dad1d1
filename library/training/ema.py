"""An exponential moving average of the trained weights (Polyak and Juditsky 1992)."""

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of named parameters over the optimizer's updates, in fp32.

    On the host it is updated by a thread, while the device computes the next step.

    Args:
        parameters: What is averaged, by name. The average begins with their values.
        decay: How much of the average stays at an update, once it has settled.
        device: Where the average is kept.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, device: torch.device):
        self._parameters = dict(parameters)
        self._decay = decay
        self.updates = 0
        self._averages = {
            name: parameter.detach().to(device, torch.float32, copy=True) for name, parameter in parameters.items()
        }
        self._elsewhere = any(parameter.device != device for parameter in parameters.values())
        self._staged = {name: self._stage(name) for name in parameters} if self._elsewhere else {}
        self._thread = ThreadPoolExecutor(1, "average") if self._elsewhere else None
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
            _blend(self._averages, self._parameters, share)
            return
        for name, parameter in self._parameters.items():
            self._staged[name].copy_(parameter.detach(), non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._pending = self._thread.submit(self._take_in, share, arrived)

    def tensors(self) -> dict[str, Tensor]:
        """The average by name, fp32."""
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
        """Inside, the parameters have the average's values; afterwards their own again, bit for bit."""
        self._settle()
        kept = {name: parameter.data for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self._averages[name].to(parameter.device, parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]

    def close(self) -> None:
        """This ends the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _stage(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        return torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)

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
        average.lerp_(values[name].detach().float(), share)
