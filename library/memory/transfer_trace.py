"""What block swap does when: which blocks are on the device at each turn, what travels meanwhile, and who waits for it.

``TransferTrace`` takes the place of the transfers that it is given and writes down every call. On a CUDA device it also
takes the device's own times, of each copy and of the moment when the computation gets to it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from library.memory.block_swap import in_backward
from library.memory.transfers import CudaTransfers, Transfers

Kind = Literal["fetch", "turn", "send home", "wait home"]


@dataclass(frozen=True)
class Event:
    """One call.

    Attributes:
        kind: A copy to the device begins; a block's turn begins; a copy to the host begins; the host waits for those.
        place: Of the block among those that are swapped; None: of all.
        slot: Which.
        size: Bytes that travel.
        at: The host's clock, in seconds.
        backward: Whether gradients are being computed.
        begin: When the device begins to copy, or gets to the turn; None without device times.
        end: When the copy is there.
    """

    kind: Kind
    place: int | None
    slot: int | None
    size: int
    at: float
    backward: bool
    begin: torch.cuda.Event | None = None
    end: torch.cuda.Event | None = None


@dataclass(frozen=True)
class Turn:
    """One block's turn. Where passes turn round a block has the last turn of one and the first of the next in one.

    Attributes:
        block: Its number.
        backward: Whether it is computed for the backward pass.
        resident: The swapped blocks that are on the device, or on their way there.
        fetched: Those whose copy begins when the turn does, in order.
        sent: Those that begin to go home before the next turn, in order.
        ahead: How many turns before this one the block's copy began; None: the block was there already.
        late: Seconds that the computation waited for the copy; None without device times.
    """

    block: int
    backward: bool
    resident: tuple[int, ...]
    fetched: tuple[int, ...]
    sent: tuple[int, ...]
    ahead: int | None
    late: float | None


@dataclass(frozen=True)
class Totals:
    """What a trace adds up to.

    Attributes:
        fetched: Bytes to the device.
        sent: Bytes to the host.
        copying: Seconds of all copies to the device; None without device times.
        waiting: Seconds that the computation waited for them.
    """

    fetched: int
    sent: int
    copying: float | None
    waiting: float | None

    @property
    def hidden(self) -> float | None:
        """The share of the copies' time during which the device computed; None if unknown."""
        if self.copying is None or self.waiting is None or self.copying == 0:
            return None
        return 1 - self.waiting / self.copying


class TransferTrace:
    """``Transfers`` that writes down what happens and lets others do it.

    Args:
        transfers: Does it.

    Attributes:
        events: In the order of the calls.
    """

    def __init__(self, transfers: Transfers):
        self.events: list[Event] = []
        self._transfers = transfers
        self._cuda = transfers if isinstance(transfers, CudaTransfers) else None
        self._places: dict[int, int] = {}  # by the address of the copy on the host
        self._held: dict[int, int] = {}  # by slot
        self._held_before: dict[int, int] = {}  # when the first of the events came

    def clear(self) -> None:
        """Forget what happened so far."""
        self.events, self._held_before = [], dict(self._held)

    def host_buffer(self, size: int) -> Tensor:
        """See ``Transfers``. The buffers are asked for in the order of the blocks."""
        buffer = self._transfers.host_buffer(size)
        self._places[buffer.data_ptr()] = len(self._places)
        return buffer

    def device_buffer(self, size: int) -> Tensor:
        """See ``Transfers``."""
        return self._transfers.device_buffer(size)

    def fetch(self, source: Tensor, target: Tensor, slot: int) -> None:
        """See ``Transfers``."""
        self._held[slot] = self._places[source.data_ptr()]
        stream = None
        if self._cuda is not None:
            self._cuda.line_up(source, slot)  # what the copy waits for is no part of its time
            stream = self._cuda.to_device
        self._copy("fetch", slot, source.nbytes, stream, lambda: self._transfers.fetch(source, target, slot))

    def wait(self, slot: int) -> None:
        """See ``Transfers``."""
        begin = None if self._cuda is None else _mark(torch.cuda.current_stream(self._cuda.device))
        self._transfers.wait(slot)
        self._note("turn", self._held[slot], slot, 0, begin)

    def send_home(self, source: Tensor, target: Tensor, slot: int) -> None:
        """See ``Transfers``."""
        stream = None
        if self._cuda is not None:
            stream = self._cuda.to_host
            stream.wait_stream(torch.cuda.current_stream(self._cuda.device))
        self._copy("send home", slot, source.nbytes, stream, lambda: self._transfers.send_home(source, target, slot))

    def wait_home(self) -> None:
        """See ``Transfers``."""
        self._transfers.wait_home()
        self._held.clear()
        self._note("wait home", None, None, 0)

    def turns(self, numbers: Sequence[int]) -> list[Turn]:
        """The turns so far. On a GPU this waits until the device is done.

        Args:
            numbers: Of the blocks that are swapped.
        """
        self._synchronize()
        turns: list[Turn] = []
        held = dict(self._held_before)
        under_way: dict[int, tuple[int, Event]] = {}  # place -> turns before its copy began, the copy
        fetched: list[int] = []
        for number, event in enumerate(self.events):
            if event.place is None or event.slot is None:
                held.clear()
            elif event.kind == "fetch":
                held[event.slot] = event.place
                under_way[event.place] = (len(turns), event)
                fetched.append(numbers[event.place])
            elif event.kind == "turn":
                held[event.slot] = event.place
                began, copy = under_way.pop(event.place, (None, None))
                turns.append(
                    Turn(
                        block=numbers[event.place],
                        backward=event.backward,
                        resident=tuple(sorted(numbers[place] for place in held.values())),
                        fetched=tuple(fetched),
                        sent=tuple(numbers[place] for place in self._sent_after(number)),
                        ahead=None if began is None else len(turns) - began,
                        late=_late(event, copy),
                    )
                )
                fetched = []
        return turns

    def totals(self) -> Totals:
        """Sums over the events so far. On a GPU this waits until the device is done."""
        self._synchronize()
        sizes = {
            kind: sum(event.size for event in self.events if event.kind == kind) for kind in ("fetch", "send home")
        }
        if self._cuda is None:
            return Totals(sizes["fetch"], sizes["send home"], None, None)
        copies = [event for event in self.events if event.kind == "fetch"]
        copying = sum(_seconds(event.begin, event.end) for event in copies)
        waiting = sum(turn.late or 0.0 for turn in self.turns(range(len(self._places))))
        return Totals(sizes["fetch"], sizes["send home"], copying, waiting)

    def _sent_after(self, turn: int) -> list[int]:
        """The places that begin to go home between a turn, by its place among the events, and the next one."""
        sent = []
        for event in self.events[turn + 1 :]:
            if event.kind == "turn":
                break
            if event.kind == "send home" and event.place is not None:
                sent.append(event.place)
        return sent

    def _copy(
        self, kind: Kind, slot: int, size: int, stream: torch.cuda.Stream | None, begin_copy: Callable[[], None]
    ) -> None:
        begin = _mark(stream) if stream is not None else None
        begin_copy()
        end = _mark(stream) if stream is not None else None
        self._note(kind, self._held[slot], slot, size, begin, end)

    def _note(
        self,
        kind: Kind,
        place: int | None,
        slot: int | None,
        size: int,
        begin: torch.cuda.Event | None = None,
        end: torch.cuda.Event | None = None,
    ) -> None:
        self.events.append(Event(kind, place, slot, size, time.perf_counter(), in_backward(), begin, end))

    def _synchronize(self) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda.device)


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _seconds(begin: torch.cuda.Event | None, end: torch.cuda.Event | None) -> float:
    assert begin is not None and end is not None
    return begin.elapsed_time(end) / 1000


def _late(turn: Event, copy: Event | None) -> float | None:
    """Seconds by which a copy was there later than the computation that needed it."""
    if turn.begin is None:
        return None
    return 0.0 if copy is None else max(0.0, _seconds(turn.begin, copy.end))
