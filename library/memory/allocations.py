"""What tensors take while code runs: every allocation as it happens, and what was alive at the peak."""

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from library.memory.operation_counts import operations

BLOCK = 512
"""Bytes that torch's caching allocator rounds each allocation up to."""


Compute = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]
"""From an operation and its arguments, what it gives."""


@dataclass(slots=True)
class _Memory:
    """One piece of memory, from its beginning to its end, in numbers of events; ``watch`` tells of the end."""

    size: int
    begin: int
    component: str
    end: int | None = None
    watch: Any = None


class Allocations(TorchDispatchMode):
    """Inside, the memory of all tensors that operations make is counted, and floating-point operations too.

    What an operation takes for itself alone, and gives back before it ends, isn't seen.

    Args:
        device: The type of the devices whose memory counts.
        compute: What gives an operation's answer; by default the operation itself.

    Attributes:
        operations: Floating-point operations since ``start``.
        peak: The most bytes that were alive at once since ``start``.
    """

    def __init__(self, device: str, compute: Compute | None = None):
        super().__init__()
        self._compute = compute or _itself
        self.operations = 0.0
        self.peak = 0
        self._device = device
        self._alive: dict[int, _Memory] = {}
        self._known: list[_Memory] = []
        self._total = self._events = self._peak_at = 0
        self._component = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """See ``TorchDispatchMode``."""
        kwargs = kwargs or {}
        answer = self._compute(func, args, kwargs)
        self.operations += operations(func, args, kwargs, answer)
        self.add((answer,) if isinstance(answer, Tensor) else tree_leaves(answer))
        return answer

    @property
    def alive(self) -> int:
        """Bytes alive now."""
        return self._total

    def start(self, component: str) -> None:
        """Count anew from here on; what is alive stays. What is allocated from now on belongs to ``component``."""
        self.operations, self.peak, self._peak_at = 0.0, self._total, self._events
        self._component = component

    def add(self, values: Iterable[Any], component: str | None = None) -> None:
        """Count the memory of tensors that were made elsewhere; what is known already stays what it is."""
        for value in values:
            if not isinstance(value, Tensor) or value.device.type != self._device:
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key in self._alive or not (size := -(-storage.nbytes() // BLOCK) * BLOCK):
                continue
            memory = _Memory(size, self._events, self._component if component is None else component)
            self._alive[key] = memory
            self._known.append(memory)
            self._moved(size)
            memory.watch = weakref.ref(storage, functools.partial(self._ended, key, memory))

    def name(self, values: Iterable[Any], component: str) -> None:
        """Say what the memory of these tensors is."""
        values = list(values)
        self.add(values)
        for value in values:
            if isinstance(value, Tensor) and (memory := self._alive.get(value.untyped_storage()._cdata)) is not None:
                memory.component = component

    def rename(self, component: str, name: str) -> None:
        """Give what is alive of one component to another."""
        for memory in self._alive.values():
            if memory.component == component:
                memory.component = name

    def leave_out(self, value: Tensor) -> None:
        """Count a tensor's memory no longer: it stands for memory elsewhere."""
        key = value.untyped_storage()._cdata
        if (memory := self._alive.pop(key, None)) is not None:
            self._close(memory)
        memory = self._alive[key] = _Memory(0, self._events, "", self._events)
        memory.watch = weakref.ref(value.untyped_storage(), functools.partial(self._forget, key))

    def at_peak(self) -> dict[str, int]:
        """What was alive at the peak: component -> bytes."""
        found: dict[str, int] = {}
        for memory in self._known:
            if memory.begin < self._peak_at and (memory.end is None or memory.end >= self._peak_at):
                found[memory.component] = found.get(memory.component, 0) + memory.size
        return found

    def _moved(self, size: int) -> None:
        self._events += 1
        self._total += size
        if self._total > self.peak:
            self.peak, self._peak_at = self._total, self._events

    def _forget(self, key: int, _: object) -> None:
        self._alive.pop(key, None)

    def _ended(self, key: int, memory: _Memory, _: object) -> None:
        if self._alive.get(key) is memory:
            del self._alive[key]
            self._close(memory)

    def _close(self, memory: _Memory) -> None:
        memory.end = self._events
        self._events += 1
        self._total -= memory.size


def _itself(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


def on_gradients(parameters: Iterable[Tensor], act: Callable[[Tensor], None]) -> None:
    """Show each gradient to ``act`` as soon as it has arrived."""

    def arrived(parameter: Tensor, act: Callable[[Tensor], None]) -> None:
        if parameter.grad is not None:
            act(parameter.grad)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(functools.partial(arrived, act=act))
