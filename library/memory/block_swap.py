"""Block swap: a few places on the device hold the weights of many blocks in turn.

Each swapped block has one copy of its weights on the host. A ring of slots on the device takes the blocks in the order
in which the pass needs them, ahead of their turn: up in a forward pass, down in a backward pass, and up again from the
start after it. What is in the slots where a pass turns round stays there. The model's code knows nothing of it.

Frozen weights never travel back. Trained ones change in their slot during the backward pass, each as soon as its
gradient is there (``library.training.fused_backward``), and go home when the last of their block has changed. What did
not change in a visit stays where it is.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.packed_weights import PackedWeights
from library.memory.transfers import Transfers

AHEAD = 2
"""Blocks that are on their way, or there already, while one computes."""

FROZEN_SLOTS = AHEAD + 1
TRAINED_SLOTS = AHEAD + 2
"""One more: a block's last gradients step it, and it goes home, while the next one computes already."""


def swapped_blocks(count: int, blocks: int, slots: int = FROZEN_SLOTS) -> list[int]:
    """Which blocks share slots so that ``count`` blocks fewer are on the device.

    The slots take room too, so there are more blocks in the ring than the device is relieved of. They are spread over
    the model, so that the blocks between them compute while one travels.

    Args:
        count: Blocks by which the device is to be relieved; 0 to ``blocks``.
        blocks: Blocks of the model.
        slots: How many there are as long as so many blocks remain.

    Returns:
        Their numbers in forward order. If all blocks are to leave, two slots remain all the same.
    """
    if not 0 <= count <= blocks:
        raise ValueError(f"{count} of {blocks} blocks can't be swapped")
    if count == 0:
        return []
    ring = min(blocks, count + slots)
    return [(2 * place + 1) * blocks // (2 * ring) for place in range(ring)]


def slot_count(count: int, blocks: int, slots: int = FROZEN_SLOTS) -> int:
    """How many slots the blocks of ``swapped_blocks`` share: at least two, or nothing could travel ahead."""
    return min(blocks, max(2, len(swapped_blocks(count, blocks, slots)) - count))


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps of a weight in a slot: where it lies in its block."""

    turn: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class BlockSwap:
    """Keeps the weights of some blocks on the host, and brings each when its turn comes.

    It wraps ``forward`` of the blocks. Wrap before checkpointing does, so that a recomputation comes through here.
    Where weights are trained, whoever reads or writes them between steps calls ``come_home`` first; state dicts of the
    blocks do so by themselves.

    Args:
        blocks: All blocks of the model in forward order, on any device.
        count: How many blocks' weights the device is relieved of.
        transfers: Moves the bytes.
        checkpointed: The numbers of the blocks whose inner activations are computed again in the backward pass.
        elsewhere: Weights that something else takes care of.

    Attributes:
        numbers: The blocks that take turns, in forward order.
        settle: Called with trained weights before they leave the device: whatever still is to change them does so.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        count: int,
        transfers: Transfers,
        *,
        checkpointed: Collection[int] = (),
        elsewhere: Collection[Tensor] = (),
    ):
        left_out = {id(tensor) for tensor in elsewhere}
        tensors = [[tensor for tensor in _tensors(block) if id(tensor) not in left_out] for block in blocks]
        self.trained = any(tensor.requires_grad for own in tensors for tensor in own)
        spare = TRAINED_SLOTS if self.trained else FROZEN_SLOTS
        self.numbers = swapped_blocks(count, len(blocks), spare)
        self.settle: Callable[[Sequence[Tensor]], None] = _nothing_is_left_to_do
        self._transfers = transfers
        self._weights = [PackedWeights(tensors[number], transfers) for number in self.numbers]
        size = max((weights.size for weights in self._weights), default=0)
        slots = slot_count(count, len(blocks), spare) if self.numbers else 0
        self._slots = [transfers.device_buffer(size) for _ in range(slots)]
        self._held: list[int | None] = [None] * slots  # the turn whose weights a slot has
        self._current: int | None = None
        self._turns = {id(tensor): turn for turn, own in enumerate(self._weights) for tensor in own.trained}
        self._changed: list[set[int]] = [set() for _ in self._weights]  # what must go home again
        for turn, number in enumerate(self.numbers):
            block = blocks[number]
            forward = partial(_swapped, self, turn, number not in checkpointed, block.forward)
            block.forward = forward  # type: ignore[method-assign]
            if self._weights[turn].trained:
                block.register_state_dict_pre_hook(partial(_come_home, self))
                block.register_load_state_dict_pre_hook(partial(_come_home, self))
            for tensor in self._weights[turn].trained:
                # a gradient may come before anything else of its block's backward pass asks for the block
                tensor.register_hook(partial(_gradient_comes, self, turn))

    @property
    def tensors(self) -> list[Tensor]:
        """All weights that are swapped."""
        return [tensor for weights in self._weights for tensor in weights.tensors]

    @property
    def host_bytes(self) -> int:
        """Memory of the copies on the host."""
        return sum(weights.size for weights in self._weights)

    @property
    def device_bytes(self) -> int:
        """Memory of the slots on the device."""
        return sum(slot.numel() for slot in self._slots)

    @property
    def device(self) -> torch.device:
        """Where the slots are."""
        return self._slots[0].device

    @property
    def resident(self) -> tuple[int, ...]:
        """The numbers of the swapped blocks that are on the device or on their way there."""
        return tuple(sorted(self.numbers[turn] for turn in self._held if turn is not None))

    def enter(self, turn: int) -> None:
        """Make a block's weights usable by what is computed from now on, and send for those that come next."""
        if turn == self._current:
            return
        self._current = None  # until everything has its place: what settles may raise
        expected = list(self._coming(turn))
        wanted = [turn, *expected[: min(AHEAD, len(self._slots) - 1)]]
        for one in wanted:
            if one not in self._held:
                self._bring(one, self._free_slot(wanted, expected))
        self._transfers.wait(self._held.index(turn))
        self._current = turn

    def changed(self, weight: Tensor) -> None:
        """Take note that a trained weight has changed in its slot; its block goes home once all have."""
        turn = self._turns.get(id(weight))
        if turn is None:
            return
        assert turn in self._held, "a weight has changed that isn't on the device"
        self._changed[turn].add(id(weight))
        if len(self._changed[turn]) == len(self._weights[turn].trained):
            self._send_home(turn)

    def come_home(self) -> None:
        """Bring all weights to the host; when this returns they are there, to be read and written."""
        for slot, held in enumerate(self._held):
            if held is not None:
                self._give_up(slot)
        self._current = None
        self._transfers.wait_home()

    @contextlib.contextmanager
    def stand_ins(self) -> Iterator[None]:
        """Inside, trained weights seem to lie on the device, without numbers.

        An optimizer that loads its state puts it where the weights are, and it must be where they step.
        """
        self.come_home()
        for weights in self._weights:
            weights.stand_in(self.device)
        try:
            yield
        finally:
            for weights in self._weights:
                weights.go_home()

    def _coming(self, turn: int) -> Iterator[int]:
        """The turns after this one, each once, in the order in which they are expected."""
        last = len(self.numbers) - 1
        up, down = range(turn + 1, last + 1), range(turn - 1, -1, -1)
        if in_backward():
            expected = itertools.chain(down, range(last + 1))
        elif torch.is_grad_enabled():
            expected = itertools.chain(up, range(last, -1, -1))
        else:
            expected = itertools.chain(up, range(last + 1))
        return (later for later in dict.fromkeys(expected) if later != turn)

    def _free_slot(self, wanted: Sequence[int], expected: Sequence[int]) -> int:
        """A slot that holds nothing, or what is needed last of all."""
        if None in self._held:
            return self._held.index(None)
        last = max((turn for turn in self._held if turn not in wanted), key=expected.index)
        slot = self._held.index(last)
        self._give_up(slot)
        return slot

    def _bring(self, turn: int, slot: int) -> None:
        weights = self._weights[turn]
        target = self._slots[slot][: weights.size]
        self._transfers.fetch(weights.master, target, slot)
        self._held[slot] = turn
        weights.lie_in(target)

    def _give_up(self, slot: int) -> None:
        turn = self._held[slot]
        assert turn is not None
        weights = self._weights[turn]
        if weights.trained:
            self.settle(weights.trained)
            self._send_home(turn)
        weights.go_home()
        self._held[slot] = None

    def _send_home(self, turn: int) -> None:
        if not self._changed[turn]:
            return
        weights, slot = self._weights[turn], self._held.index(turn)
        self._transfers.send_home(self._slots[slot][: weights.size], weights.master, slot)
        self._changed[turn].clear()
        if turn == self._current:
            self._current = None  # whoever enters it again waits until it has left, and may change it then

    def pack(self, turn: int, tensor: Tensor) -> Tensor | _Saved:
        """What autograd shall keep of ``tensor``: of a weight in a slot, which others will use meanwhile, its place."""
        slot = self._slots[self._held.index(turn)]
        if tensor.untyped_storage()._cdata != slot.untyped_storage()._cdata:  # on meta all addresses are 0
            return tensor
        offset = int(tensor.storage_offset()) * tensor.dtype.itemsize
        return _Saved(turn, offset, tensor.shape, tensor.stride(), tensor.dtype)

    def unpack(self, kept: Tensor | _Saved) -> Tensor:
        """The tensor that ``pack`` was given, brought back to the device if need be."""
        if not isinstance(kept, _Saved):
            return kept
        self.enter(kept.turn)
        slot = self._slots[self._held.index(kept.turn)]
        return slot[kept.offset :].view(kept.dtype).as_strided(kept.size, kept.stride)


def _tensors(block: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(block.parameters(), block.buffers())


def _nothing_is_left_to_do(weights: Sequence[Tensor]) -> None:
    """What settles where no weight is trained."""


def _come_home(swap: BlockSwap, *_: Any) -> None:
    swap.come_home()


def _gradient_comes(swap: BlockSwap, turn: int, _: Tensor) -> None:
    swap.enter(turn)


def in_backward() -> bool:
    """Whether autograd is computing gradients in this thread."""
    return torch._C._current_graph_task_id() != -1


def _swapped(
    swap: BlockSwap, turn: int, keeps_activations: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    swap.enter(turn)
    with _uncached_autocast() if swap.trained else contextlib.nullcontext():
        if not keeps_activations or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(partial(swap.pack, turn), swap.unpack):
            return forward(*args, **kwargs)


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Inside, autocast doesn't keep what it casts: it would keep all blocks' weights until the forward pass ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
