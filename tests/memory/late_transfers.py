"""Transfers on the host that arrive as late as they may, and say what happened."""

import torch


class LateTransfers:
    """``library.memory.transfers.Transfers``: a fetched slot holds no numbers until somebody waits for it.

    What is computed from a slot without waiting, or after it was given to another block, comes out as NaN; so does what
    is read on the host before it has come home. A slot that is changed while it is on its way home fails.

    ``fetched`` and ``sent`` have the copies in order, ``ahead`` how many blocks were waited for between a copy's start
    and its use.
    """

    def __init__(self):
        self.masters, self.fetched, self.ahead, self.sent = [], [], [], []
        self.device_size = self._waits = 0
        # by slot what comes, by slot what leaves it, and by its end what is on its way home
        self._under_way, self._leaving, self._to_the_host = {}, {}, {}

    def host_buffer(self, size):
        self.masters.append(torch.zeros(size, dtype=torch.uint8))
        return self.masters[-1]

    def device_buffer(self, size):
        self.device_size += size
        return torch.full((size,), 255, dtype=torch.uint8)

    def fetch(self, source, target, slot):
        self._leave(slot)
        for other in [other for other, (_, home, _) in self._leaving.items() if home.data_ptr() == source.data_ptr()]:
            self._leave(other)
        self._arrive_home(source.data_ptr())
        target.fill_(255)
        self._under_way[slot] = (source, target, self._waits)
        self.fetched.append(source)

    def wait(self, slot):
        self._leave(slot)
        if slot in self._under_way:
            source, target, asked = self._under_way.pop(slot)
            target.copy_(source)
            self.ahead.append(self._waits - asked)
        self._waits += 1

    def send_home(self, source, target, slot):
        assert slot not in self._under_way, "a slot is sent home before its content has come"
        self._leave(slot)
        target.fill_(255)
        self._leaving[slot] = (source, target, source.clone())
        self.sent.append(target)

    def wait_home(self):
        for slot in list(self._leaving):
            self._leave(slot)
        for address in list(self._to_the_host):
            self._arrive_home(address)

    def _leave(self, slot):
        if slot in self._leaving:
            source, target, then = self._leaving.pop(slot)
            assert torch.equal(source, then), "a slot has changed while it was on its way home"
            self._to_the_host[target.data_ptr()] = (target, then)

    def _arrive_home(self, address):
        if address in self._to_the_host:
            target, then = self._to_the_host.pop(address)
            target.copy_(then)

    def turn_of(self, master):
        """The place in the ring of the block that a copy belongs to."""
        return next(turn for turn, own in enumerate(self.masters) if own.data_ptr() == master.data_ptr())
