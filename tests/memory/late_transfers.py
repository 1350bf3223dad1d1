"""Transfers on the host that arrive as late as they may, and say what happened."""

import torch


class LateTransfers:
    """``library.memory.transfers.Transfers``: a fetched slot holds no numbers until somebody waits for it.

    What is computed from a slot without waiting, or after it was given to another block, comes out as NaN. ``fetched``
    has the copies in order, ``ahead`` how many blocks were waited for between a copy's start and its use.
    """

    def __init__(self):
        self.masters, self.fetched, self.ahead = [], [], []
        self.device_size = self._waits = 0
        self._under_way = {}

    def host_buffer(self, size):
        self.masters.append(torch.zeros(size, dtype=torch.uint8))
        return self.masters[-1]

    def device_buffer(self, size):
        self.device_size += size
        return torch.full((size,), 255, dtype=torch.uint8)

    def fetch(self, source, target, slot):
        target.fill_(255)
        self._under_way[slot] = (source, target, self._waits)
        self.fetched.append(source)

    def wait(self, slot):
        if slot in self._under_way:
            source, target, asked = self._under_way.pop(slot)
            target.copy_(source)
            self.ahead.append(self._waits - asked)
        self._waits += 1

    def turn_of(self, master):
        """The place in the ring of the block that a copy belongs to."""
        return next(turn for turn, own in enumerate(self.masters) if own.data_ptr() == master.data_ptr())
