"""What block swap does, as its trace tells it."""

from library.memory.block_swap import AHEAD, BlockSwap
from library.memory.transfer_trace import TransferTrace
from tests.memory import test_block_swap as frozen
from tests.memory import test_trained_swap as trained
from tests.memory.late_transfers import LateTransfers

DEPTH = frozen.DEPTH
UP, DOWN = list(range(DEPTH)), list(range(DEPTH - 1, -1, -1))


def traced_step(step, swap, trace):
    """The turns of a step that has another one before it."""
    step(0)
    trace.clear()
    step(1)
    return trace.turns(swap.numbers)


def adapted(count):
    model, trace = frozen.Adapted(), TransferTrace(LateTransfers())
    swap = BlockSwap(list(model.blocks), count, trace)
    return lambda seed: frozen.step(model, seed), swap, trace


def swapped_training(count):
    return trained.Training(count, transfers=TransferTrace(LateTransfers()))


def test_a_frozen_base_goes_up_and_down_and_nothing_travels_back():
    step, swap, trace = adapted(4)
    turns = traced_step(step, swap, trace)
    # where a pass turns round, the block stays, and its turn goes on: in block 6, and in block 0 of the step before
    assert [turn.block for turn in turns] == UP[1:] + DOWN[1:]
    assert [turn.backward for turn in turns] == [False] * (DEPTH - 1) + [True] * (DEPTH - 1)
    assert [turn.resident for turn in turns] == [
        *[(at, at + 1, at + 2) for at in (1, 2, 3, 4)],
        *[(4, 5, 6)] * 2,
        *[(at - 2, at - 1, at) for at in (5, 4, 3, 2)],
        *[(0, 1, 2)] * 2,
    ]
    assert all(turn.ahead is None or turn.ahead >= AHEAD for turn in turns)
    assert [turn.block for turn in turns if turn.ahead is None] == [1, 2, 5, 4], "these were there at the turns"
    totals = trace.totals()
    per_block = swap.host_bytes // DEPTH
    assert (totals.fetched, totals.sent) == (2 * 4 * per_block, 0)
    assert not any(turn.sent for turn in turns)
    assert totals.hidden is None and turns[0].late is None, "without a device there are no device times"


def test_trained_blocks_go_home_once_after_their_turn_in_the_backward_pass():
    training = swapped_training(3)
    trace = training.transfers
    turns = traced_step(training.step, training.swap, trace)
    assert [turn.block for turn in turns] == UP + DOWN[1:], "a block that has gone home has a new turn"
    sent = [(turn.block, block) for turn in turns for block in turn.sent]
    assert [block for _, block in sent] == DOWN
    assert all(turn.backward for turn in turns if turn.sent)
    assert all(block - at <= 1 for at, block in sent), "a block goes home in the turn after its own"
    totals = trace.totals()
    assert totals.sent == training.swap.host_bytes
    assert totals.fetched == training.swap.host_bytes * 6 // DEPTH


def test_looking_goes_round_and_sends_nothing_home():
    training = swapped_training(3)
    training.look()
    training.transfers.clear()
    training.look()
    turns = training.transfers.turns(training.swap.numbers)
    assert [turn.block for turn in turns] == UP
    assert training.transfers.totals().sent == 0
    training.swap.come_home()
    training.transfers.clear()
    training.look()
    assert training.transfers.turns(training.swap.numbers)[0].resident == (0, 1, 2), "the device was empty before"
