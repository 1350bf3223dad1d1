"""The optimizer's state on the host: each parameter's comes to the device for its step and goes home after it.

A few slots on the device hold the states of parameters whose turn it is or comes next. Copies to the device and copies
home run on streams of their own, beside the computation and beside each other. All order between them is kept on the
device. The host waits while slots are made or grow, in the first steps, and when somebody wants to read the state.

Small tensors stay on the device: counters, row and column statistics, scales.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from library.memory.state_transfers import StateTransfers

AHEAD = 2
"""Parameters whose state is on its way, or there already, while another one steps."""

SMALLEST = 1 << 16
"""Bytes; smaller tensors stay on the device."""

_SLOTS = AHEAD + 2  # one more steps, and one more is on its way home
_ALIGNMENT = 512  # of each tensor in its slot, in bytes, as torch's own allocator has it


@dataclass
class _Slot:
    """A place on the device.

    Attributes:
        buffer: Its memory.
        owner: Whose state it holds, or is about to; None: nobody's.
        sources: By name, the tensors on the host that were copied here.
    """

    buffer: Tensor
    owner: int | None = None
    sources: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class _Turns:
    """In which order parameters step.

    Attributes:
        order: Those whose state moves.
        places: For each parameter that steps, the place in the order of the first one after it.
    """

    order: list[int] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)

    def note(self, number: int, *, moves: bool) -> None:
        if moves:
            self.order.append(number)
        self.places[number] = len(self.order)


class StateOffload:
    """Keeps the large tensors of an optimizer's state on the host (``library.optimizers.one_by_one.StateHome``).

    Args:
        optimizer: Its state may be there already, on the host or on the device.
        parameters: The optimizer's, in the order in which they are expected to step at first. Later on, the order of
            the last step is expected.
        device: Where they step.
        transfers: Moves the bytes.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Iterable[Tensor], device: torch.device, transfers: StateTransfers
    ):
        self._optimizer, self._device, self._transfers = optimizer, device, transfers
        self._parameters = list(parameters)
        self._numbers = {parameter: number for number, parameter in enumerate(self._parameters)}
        self._homes: dict[int, dict[str, Tensor]] = {}
        self._slots: list[_Slot] = []
        self._free: deque[int] = deque()  # slots, the one that was left first in front
        self._expected = _Turns()
        for number in range(len(self._parameters)):
            self._expected.note(number, moves=True)
        self._turns = _Turns()
        optimizer.register_state_dict_pre_hook(lambda _: self.settle())

    @property
    def host_bytes(self) -> int:
        """Memory of the state on the host."""
        return sum(tensor.nbytes for home in self._homes.values() for tensor in home.values())

    @property
    def device_bytes(self) -> int:
        """Memory of the slots on the device."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def bring(self, parameter: Tensor) -> None:
        """See ``StateHome``. The states of the parameters that are expected next are sent for, too."""
        number = self._numbers[parameter]
        coming = self._after(number)
        keep = {number, *coming}
        if (slot := self._fetch(number, keep)) is not None:
            self._transfers.wait(slot)
            self._state(number).update(_views(self._slots[slot].buffer, self._slots[slot].sources))
        for later in coming:
            self._fetch(later, keep)

    def send_home(self, parameter: Tensor) -> None:
        """See ``StateHome``."""
        number = self._numbers[parameter]
        state = self._state(number)
        leaving = {name: value for name, value in state.items() if _is_large(value)}
        self._turns.note(number, moves=bool(leaving))
        slot = self._slot_of(number)
        if not leaving:
            if slot is not None:  # the step did away with what it was brought
                self._transfers.send_home(number, (), slot)
                self._release(slot)
            return
        if slot is None or self._slots[slot].buffer.numel() < _size(leaving):
            slot = self._claim(_size(leaving), keep={number})
            self._transfers.wait(slot)
        views = _views(self._slots[slot].buffer, leaving)
        _put_in(views, leaving, self._slots[slot].buffer)
        home = self._homes[number] = {name: self._home(number, name, view) for name, view in views.items()}
        self._transfers.send_home(number, [(view, home[name]) for name, view in views.items()], slot)
        state.update(home)
        self._release(slot)

    def finish(self) -> None:
        """See ``StateHome``. The next step is expected to have the order of this one; its first states are sent for."""
        if self._turns.places:
            self._expected, self._turns = self._turns, _Turns()
        coming = self._expected.order[:AHEAD]
        for number in coming:
            self._fetch(number, set(coming))

    def settle(self) -> None:
        """See ``StateHome``."""
        self._transfers.settle()

    def _after(self, number: int) -> list[int]:
        """The parameters whose states are to be on their way while this one steps."""
        coming: list[int] = []
        order = self._expected.order
        for place in range(self._expected.places.get(number, len(order)), len(order)):
            if len(coming) == AHEAD:
                break
            if order[place] not in self._turns.places:
                coming.append(order[place])
        return coming

    def _fetch(self, number: int, keep: set[int]) -> int | None:
        """Begin to bring a state to the device, unless it is under way; returns its slot, None if nothing is away."""
        away = {name: value for name, value in self._state(number).items() if self._is_away(number, name, value)}
        slot = self._slot_of(number)
        if slot is not None:
            sources = self._slots[slot].sources
            if sources.keys() == away.keys() and all(sources[name] is value for name, value in away.items()):
                return slot
            self._release(slot)  # a state that was loaded since then
        if not away:
            return None
        slot = self._claim(_size(away), keep)
        self._slots[slot].owner, self._slots[slot].sources = number, away
        views = _views(self._slots[slot].buffer, away)
        self._transfers.fetch(number, [(away[name], view) for name, view in views.items()], slot)
        return slot

    def _is_away(self, number: int, name: str, value: Any) -> bool:
        if not _is_large(value):
            return False
        return value is self._homes.get(number, {}).get(name) or value.device.type != self._device.type

    def _state(self, number: int) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.state.get(self._parameters[number], {})
        return state

    def _home(self, number: int, name: str, view: Tensor) -> Tensor:
        """The place on the host of a tensor of the state; a new one if that changed its form."""
        home = self._homes.get(number, {}).get(name)
        if home is None or (home.shape, home.stride(), home.dtype) != (view.shape, view.stride(), view.dtype):
            home = self._transfers.host_tensor(view)
        return home

    def _slot_of(self, number: int) -> int | None:
        return next((place for place, slot in enumerate(self._slots) if slot.owner == number), None)

    def _claim(self, size: int, keep: set[int]) -> int:
        """A slot of so many bytes that is nobody's now."""
        if not self._slots or self._slots[0].buffer.numel() < size:
            self._make_slots(size)
        if not self._free:
            self._release(next(place for place, slot in enumerate(self._slots) if slot.owner not in keep))
        return self._free.popleft()

    def _make_slots(self, size: int) -> None:
        """Make the slots anew, large enough for every state that there is. What was sent for has to come again."""
        self._transfers.settle()
        self._slots.clear()
        for number in range(len(self._parameters)):
            size = max(size, _size({name: value for name, value in self._state(number).items() if _is_large(value)}))
        self._slots = [_Slot(self._transfers.device_buffer(size)) for _ in range(_SLOTS)]
        self._free = deque(range(_SLOTS))

    def _release(self, slot: int) -> None:
        self._slots[slot].owner, self._slots[slot].sources = None, {}
        self._free.append(slot)


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.nbytes >= SMALLEST


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a slot that holds them."""
    return sum(_aligned(tensor) for tensor in tensors.values())


def _views(buffer: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these forms, one after the other in a buffer."""
    views, begin = {}, 0
    for name, tensor in like.items():
        flat = buffer[begin : begin + tensor.nbytes].view(tensor.dtype)
        views[name] = flat.as_strided(tensor.shape, _strides(tensor))
        begin += _aligned(tensor)
    return views


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Those of the tensor if it has no gaps, else those of a contiguous one."""
    extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    return tensor.stride() if extent == tensor.numel() else torch.empty(tensor.shape, device="meta").stride()


def _put_in(views: Mapping[str, Tensor], values: Mapping[str, Tensor], buffer: Tensor) -> None:
    """Bring values into their views of a buffer; they may lie there already, at their own place or another's."""
    memory = buffer.untyped_storage().data_ptr()
    moved = {}
    for name, value in values.items():
        view = views[name]
        if (value.data_ptr(), value.stride()) != (view.data_ptr(), view.stride()):
            moved[name] = value.clone() if value.untyped_storage().data_ptr() == memory else value
    for name, value in moved.items():
        views[name].copy_(value)
