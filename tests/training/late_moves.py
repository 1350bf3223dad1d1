"""Runs on the host that move weights and activations as if there were an accelerator, as late as they may."""

from library.training import placing
from tests.memory.late_transfers import LateTransfers


class CopyingStash:
    """A stash on the host."""

    def put(self, tensor):
        return tensor.clone()

    def send_for(self, kept):
        pass

    def take(self, kept):
        return kept


def move_late(patch) -> list[LateTransfers]:
    """Until ``patch`` is undone; returns where the transfers come that are made from now on."""
    made = []

    def transfers():
        made.append(LateTransfers())
        return made[-1]

    patch.setattr(placing, "transfers_to", lambda device: transfers)
    patch.setattr(placing, "stash_for", lambda device: CopyingStash())
    return made
