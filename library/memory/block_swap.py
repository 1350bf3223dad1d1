"""Block swap: a few places on the device hold the frozen weights of many blocks in turn.

Each swapped block has one copy of its frozen weights on the host, which never changes and never travels back. A ring
of slots on the device takes the blocks in the order in which the pass needs them, ahead of their turn: up in a forward
pass, down in a backward pass, and up again from the start after it. What is in the slots where a pass turns round stays
there. The model's code knows nothing of it.
"""

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


def swapped_blocks(count: int, blocks: int) -> list[int]:
    """Which blocks share slots so that ``count`` blocks fewer are on the device.

    The slots take room too, so there are more blocks in the ring than the device is relieved of. They are spread over
    the model, so that the blocks between them compute while one travels.

    Args:
        count: Blocks by which the device is to be relieved; 0 to ``blocks``.
        blocks: Blocks of the model.

    Returns:
        Their numbers in forward order. If all blocks are to leave, two slots remain all the same.
    """
    if not 0 <= count <= blocks:
        raise ValueError(f"{count} of {blocks} blocks can't be swapped")
    if count == 0:
        return []
    ring = min(blocks, count + AHEAD + 1)
    return [(2 * place + 1) * blocks // (2 * ring) for place in range(ring)]


def slot_count(count: int, blocks: int) -> int:
    """How many slots the blocks of ``swapped_blocks`` share: at least two, or nothing could travel ahead."""
    return min(blocks, max(2, len(swapped_blocks(count, blocks)) - count))


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps of a weight in a slot: where it lies in its block."""

    turn: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class BlockSwap:
    """Keeps the frozen weights of some blocks on the host, and brings each when its turn comes.

    It wraps ``forward`` of the blocks. Wrap before checkpointing does, so that a recomputation comes through here.

    Args:
        blocks: All blocks of the model in forward order, on any device.
        count: How many blocks' weights the device is relieved of.
        transfers: Moves the bytes.
        checkpointed: The numbers of the blocks whose inner activations are computed again in the backward pass.
        elsewhere: Weights that something else takes care of.

    Attributes:
        numbers: The blocks that take turns, in forward order.
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
        self.numbers = swapped_blocks(count, len(blocks))
        self._transfers = transfers
        self._weights = [PackedWeights(_frozen(blocks[number], elsewhere), transfers) for number in self.numbers]
        size = max((weights.size for weights in self._weights), default=0)
        slots = slot_count(count, len(blocks)) if self.numbers else 0
        self._slots = [transfers.device_buffer(size) for _ in range(slots)]
        self._held: list[int | None] = [None] * slots  # the turn whose weights a slot has
        self._current: int | None = None
        for turn, number in enumerate(self.numbers):
            block = blocks[number]
            forward = partial(_swapped, self, turn, number not in checkpointed, block.forward)
            block.forward = forward  # type: ignore[method-assign]

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
    def resident(self) -> tuple[int, ...]:
        """The numbers of the swapped blocks that are on the device or on their way there."""
        return tuple(sorted(self.numbers[turn] for turn in self._held if turn is not None))

    def enter(self, turn: int) -> None:
        """Make a block's weights usable by what is computed from now on, and send for those that come next."""
        if turn == self._current:
            return
        self._current = turn
        self._bring(turn, keep={turn})
        coming = list(itertools.islice(self._coming(turn), len(self._slots) - 1))
        for number, later in enumerate(coming):
            self._bring(later, keep={turn, *coming[: number + 1]})
        self._transfers.wait(self._held.index(turn))

    def _coming(self, turn: int) -> Iterator[int]:
        """The turns after this one, each once, in the order in which they are expected."""
        last = len(self.numbers) - 1
        up, down = range(turn + 1, last + 1), range(turn - 1, -1, -1)
        if _in_backward():
            expected = itertools.chain(down, range(last + 1))
        elif torch.is_grad_enabled():
            expected = itertools.chain(up, range(last, -1, -1))
        else:
            expected = itertools.chain(up, range(last + 1))
        return (later for later in dict.fromkeys(expected) if later != turn)

    def _bring(self, turn: int, keep: set[int]) -> None:
        if turn in self._held:
            return
        slot = next(number for number, held in enumerate(self._held) if held not in keep)
        if (leaving := self._held[slot]) is not None:
            self._weights[leaving].go_home()
        weights, target = self._weights[turn], self._slots[slot][: self._weights[turn].size]
        self._transfers.fetch(weights.master, target, slot)
        self._held[slot] = turn
        weights.lie_in(target)

    def pack(self, turn: int, tensor: Tensor) -> Tensor | _Saved:
        """What autograd shall keep of ``tensor``: of a weight in a slot, which others will use meanwhile, its place."""
        slot = self._slots[self._held.index(turn)]
        if tensor.untyped_storage().data_ptr() != slot.untyped_storage().data_ptr():
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


def _frozen(block: nn.Module, elsewhere: Collection[Tensor]) -> Iterator[Tensor]:
    """The weights of a block that never change, each once."""
    left_out = {id(tensor) for tensor in elsewhere}
    for tensor in itertools.chain(block.parameters(), block.buffers()):
        if not tensor.requires_grad and id(tensor) not in left_out:
            yield tensor


def _in_backward() -> bool:
    """Whether autograd is computing gradients in this thread."""
    return torch._C._current_graph_task_id() != -1


def _swapped(
    swap: BlockSwap, turn: int, keeps_activations: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    swap.enter(turn)
    if not keeps_activations or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with torch.autograd.graph.saved_tensors_hooks(partial(swap.pack, turn), swap.unpack):
        return forward(*args, **kwargs)
