"""Reading an entry of a shard into memory: where it lies, what its tensors are like, and as few copies as possible."""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.data.shard_files import OpenShard
from library.io.safetensors import torch_dtype


class EntryMemory(NamedTuple):
    """Memory for one entry.

    Attributes:
        tensors: By name.
        buffers: The same memory as bytes, tensor by tensor in the order of the layout.
    """

    tensors: dict[str, Tensor]
    buffers: list[np.ndarray]


class Layout:
    """What the tensors of an entry are like; there are few, whatever the number of entries.

    Args:
        tensors: Name, the format's name of the type, shape and bytes of each, in the order in which they lie.
    """

    def __init__(self, tensors: Sequence[tuple[str, str, Sequence[int], int]]):
        self._names = [name for name, _, _, _ in tensors]
        self._dtypes = [torch_dtype(dtype) for _, dtype, _, _ in tensors]
        self._shapes = [tuple(shape) for _, _, shape, _ in tensors]
        self._lengths = [length for _, _, _, length in tensors]
        # Shards hold wide types first, so this keeps the tensors aligned
        self._offsets = [sum(self._lengths[:number]) for number in range(len(tensors) + 1)]
        self._begins = struct.Struct(f"<{len(tensors)}q")

    def pack(self, begins: Sequence[int]) -> bytes:
        """The positions of an entry's tensors in its shard, as an index keeps them."""
        return self._begins.pack(*begins)

    def unpack(self, begins: bytes) -> tuple[int, ...]:
        """The inverse of ``pack``."""
        return self._begins.unpack(begins)

    def allocate(self) -> EntryMemory:
        """Memory for one entry."""
        data = np.empty(self._offsets[-1], dtype=np.uint8)
        tensors = {}
        for name, dtype, shape, length, offset in self._parts():
            if length:
                flat = torch.frombuffer(data, dtype=dtype, count=length // dtype.itemsize, offset=offset)
                tensors[name] = flat.view(shape)
            else:
                tensors[name] = torch.empty(shape, dtype=dtype)
        return EntryMemory(tensors, [data[begin:end] for begin, end in zip(self._offsets, self._offsets[1:])])

    def allocate_rows(self, count: int) -> list[EntryMemory]:
        """Memory for several entries, in which tensors of one name lie one after the other."""
        columns, buffers = {}, []
        for name, dtype, shape, length, _ in self._parts():
            data = np.empty((count, length), dtype=np.uint8)
            columns[name] = torch.from_numpy(data).view(-1).view(dtype).view(count, *shape).unbind()
            buffers.append(data)
        return [
            EntryMemory({name: rows[row] for name, rows in columns.items()}, [column[row] for column in buffers])
            for row in range(count)
        ]

    def read(self, shard: OpenShard, begins: Sequence[int], memory: EntryMemory) -> dict[str, Tensor]:
        """The tensors of an entry by name, read into ``memory``: at once where they lie one after the other.

        Raises:
            FileNotFoundError: The shard is gone.
            OSError: It can't be read.
        """
        first = 0
        for number in range(1, len(begins) + 1):
            if number == len(begins) or begins[number] != begins[number - 1] + self._lengths[number - 1]:
                shard.read_into(begins[first], memory.buffers[first:number])
                first = number
        return memory.tensors

    def _parts(self) -> "zip[tuple[str, torch.dtype, tuple[int, ...], int, int]]":
        return zip(self._names, self._dtypes, self._shapes, self._lengths, self._offsets)


class Location(NamedTuple):
    """Where an entry lies.

    Attributes:
        shard: The shard's file name.
        size: The size that the shard must have.
        layout: What the entry's tensors are like.
        begins: Where each begins, counted from the start of the shard.
    """

    shard: str
    size: int
    layout: Layout
    begins: tuple[int, ...]
