"""Copies of optimizer state that arrive as late as they may, and say what happened."""

import torch

NOTHING = 255
"""Each byte of what holds no numbers: as floats, NaN."""


def _blank(tensor):
    extent = tensor.untyped_storage().nbytes()
    torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), 0, (extent,)).fill_(NOTHING)


class LateStateTransfers:
    """``library.memory.state_transfers.StateTransfers``: no copy is done before somebody has to wait for it.

    A slot holds no numbers from when something is fetched into it until that is waited for, and once its content is
    home; what is written to it before goes home instead. A tensor on the host holds none from when something is sent to
    it until it is fetched again, or all is settled. ``happened`` has in order what was fetched, used and sent home, and
    whose it was.
    """

    def __init__(self):
        self.hosts, self.slots, self.happened = [], [], []
        self._coming, self._going = {}, {}

    def host_tensor(self, like):
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        _blank(tensor)
        self.hosts.append(tensor)
        return tensor

    def device_buffer(self, size):
        self.slots.append(torch.full((size,), NOTHING, dtype=torch.uint8))
        return self.slots[-1]

    def fetch(self, owner, copies, slot):
        self._arrive_home(lambda other, place: other == owner or place == slot)
        for _, target in copies:
            target.view(torch.uint8).fill_(NOTHING)
        self._coming[slot] = (copies, owner)
        self.happened.append(("fetched", owner))

    def wait(self, slot):
        self._arrive_home(lambda other, place: place == slot)
        if slot in self._coming:
            copies, owner = self._coming.pop(slot)
            for source, target in copies:
                target.copy_(source)
            self.happened.append(("used", owner))

    def send_home(self, owner, copies, slot):
        self._arrive_home(lambda other, place: other == owner)
        for _, target in copies:
            _blank(target)
        self._going[owner] = (copies, slot)
        self.happened.append(("sent home", owner))

    def settle(self):
        self._arrive_home(lambda owner, place: True)

    def _arrive_home(self, wanted):
        for owner, (copies, slot) in list(self._going.items()):
            if wanted(owner, slot):
                for source, target in copies:
                    target.copy_(source)
                    source.view(torch.uint8).fill_(NOTHING)
                del self._going[owner]
