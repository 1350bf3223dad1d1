"""The part of a packed store that belongs to one process: open files, an index, and entries that wait to be written."""

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.data.entries import Location
from library.data.shard_files import OpenShard, shard_files
from library.data.shard_index import ShardIndex


class OpenedStore:
    """What one process has open of a store, and what it has gathered to write. Calls take turns by ``lock``.

    Args:
        place: The store's folder, or its URL.
        index_folder: Where its index lies.
        shard_bytes: As of ``PackedStore``.
        inherited: What the parent of a fork had opened. It is kept, unused: closing its database here could undo a
            transaction of the parent's.

    Attributes:
        pending: Entries that wait to be written.
        pending_bytes: Their size.
        oldest: When the first of them came, on the clock of ``time.monotonic``.
    """

    def __init__(self, place: str, index_folder: Path, shard_bytes: int, inherited: "OpenedStore | None"):
        self.process = os.getpid()
        self.lock = threading.RLock()
        self.files = shard_files(place)
        self.index = ShardIndex(self.files, index_folder, shard_bytes)
        self.pending: dict[str, dict[str, Tensor]] = {}
        self.pending_bytes = 0
        self.oldest = 0.0
        self._inherited = inherited

    def shard(self, location: Location) -> OpenShard | None:
        """The shard of a location; None: it is gone."""
        with contextlib.suppress(FileNotFoundError):
            return self.files.open(location.shard, location.size)
        return None

    def find(self, key: str) -> tuple[Location, OpenShard] | None:
        """Where an entry lies that was written, and its shard."""
        location = None if key in self.pending else self.index.locate(key)
        shard = None if location is None else self.shard(location)
        return None if location is None or shard is None else (location, shard)

    def gather(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keeps copies of entries that are to be written."""
        if not self.pending:
            self.oldest = time.monotonic()
        for key, tensors in entries.items():
            if key not in self.pending:
                copies = {name: _host_copy(tensor) for name, tensor in tensors.items()}
                self.pending[key] = copies
                self.pending_bytes += sum(tensor.nbytes for tensor in copies.values())

    def gather_anew(self) -> None:
        """Lets go of what was gathered."""
        self.pending = {}
        self.pending_bytes = 0

    def close(self) -> None:
        """Closes the index and the shards; the next use opens them again."""
        self.index.close()
        self.files.close()


def _host_copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
