"""The matrices that a file holds in fp8, as codes and scales: for whoever keeps them so."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from library.io.key_maps import KeyMap, from_diffusers
from library.io.parts import Part
from library.io.safetensors import LazyTensors
from library.io.scaled_fp8 import FP8


class Fp8Matrix(NamedTuple):
    """A matrix in fp8; the weight is ``codes * scales``.

    Attributes:
        codes: (O, I), float8_e4m3fn.
        scales: One for each output (O, 1), fp32; ones where the file has none.
    """

    codes: Tensor
    scales: Tensor


class Fp8Matrices(Mapping[str, Fp8Matrix]):
    """A part's matrices in fp8 by the names of their weights in our layout, each read when it is looked up.

    Args:
        part: Where they lie.
        maps: All its tensors in both spellings; unused where the part is in our layout.
    """

    def __init__(self, part: Part, maps: Sequence[KeyMap] = ()):
        self.part = part
        self._tensors = LazyTensors(part)
        if part.layout == "single":
            maps = [KeyMap(name, (name,), "copy") for name in part.names]
        self._maps = {entry.ours: entry for entry in maps if all(self._is_matrix(name) for name in entry.theirs)}

    def __getitem__(self, name: str) -> Fp8Matrix:
        entry = self._maps[name]
        codes = {theirs: self._tensors.as_stored(theirs) for theirs in entry.theirs}
        scales = {
            theirs: self._tensors.scale_of(theirs).expand(len(stored), 1).contiguous()
            for theirs, stored in codes.items()
        }
        (_, joined_codes), (_, joined_scales) = *from_diffusers(codes, [entry]), *from_diffusers(scales, [entry])
        return Fp8Matrix(joined_codes.flatten(1), joined_scales.flatten(1))

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def _is_matrix(self, name: str) -> bool:
        info = self.part.tensors.get(name)
        return info is not None and info.dtype == FP8 and len(info.shape) in (2, 4)
