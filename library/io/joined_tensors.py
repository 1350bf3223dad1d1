"""Tensors of several parts under one set of names, as a file with all of them holds them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class PrefixedTensors(NamedTuple):
    """The tensors of one part.

    Attributes:
        prefix: Goes before their names.
        tensors: By name; they may be read when they are looked up.
        dtype: Type to convert floating-point ones to; None: each keeps its own.
    """

    prefix: str
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype | None = None


class JoinedTensors(Mapping[str, Tensor]):
    """The tensors of all parts, each converted when it is looked up and not kept.

    Args:
        parts: No name may occur twice.
    """

    def __init__(self, *parts: PrefixedTensors):
        self._places = {part.prefix + name: (part, name) for part in parts for name in part.tensors}
        if len(self._places) < sum(len(part.tensors) for part in parts):
            raise ValueError("two parts have a tensor of the same name")

    def __getitem__(self, name: str) -> Tensor:
        part, own = self._places[name]
        tensor = part.tensors[own]
        return tensor.to(part.dtype) if part.dtype is not None and tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
