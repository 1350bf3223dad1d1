"""Tensors in and out of safetensors files, one at a time: no file is ever held in memory twice."""

import json
import math
import mmap as memory_map
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from library.config.errors import ConfigError
from library.io.atomic import atomic_path
from library.io.header import Header, TensorInfo
from library.io.parts import Part
from library.io.pickles import load_pickle

_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_FORMAT_NAMES = {getattr(torch, name): dtype for dtype, name in _TORCH_NAMES.items() if hasattr(torch, name)}


def torch_dtype(name: str) -> torch.dtype:
    """This is torch's type for the format's ``name``.

    Raises:
        ValueError: torch, or this version of it, has none.
    """
    dtype = getattr(torch, _TORCH_NAMES.get(name, ""), None)
    if dtype is None:
        raise ValueError(f"torch {torch.__version__} has no type for tensors stored as {name}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """This is the format's name for torch's type.

    Raises:
        ValueError: The format has none.
    """
    if dtype not in _FORMAT_NAMES:
        raise ValueError(f"safetensors files can't hold tensors of the type {dtype}")
    return _FORMAT_NAMES[dtype]


def load_tensors(
    header: Header,
    names: Iterable[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    mmap: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """This yields tensors of a file, one at a time, in the type they are stored in.

    Args:
        header: The file, from ``read_header`` or ``read_pickle_header``.
        names: Which tensors, in which order; all of them, in the file's order, by default.
        device: Where they go. On ``meta`` nothing is read.
        mmap: Map the file's pages rather than reading them. A tensor that stays on the CPU then shares the file's
            pages (privately: writing to it doesn't reach the file).

    Yields:
        Name and tensor.
    """
    chosen = list(header.tensors) if names is None else list(names)
    if torch.device(device).type == "meta":
        for name in chosen:
            info = header.tensors[name]
            yield name, torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")
    elif header.format == "pickle":
        tensors = load_pickle(header, mmap=mmap)
        for name in chosen:
            yield name, tensors.pop(name).to(device)
    else:
        with open(header.path, "rb") as file:
            for name in chosen:
                yield name, _read(file, header, header.tensors[name], mmap).to(device)


class LazyTensors(Mapping[str, Tensor]):
    """A part's tensors by its own names, each read when it is looked up and not kept. ``items()`` streams them.

    What is stored in fp8 with a scale comes as the product, in fp32.
    """

    def __init__(self, part: Part, *, device: torch.device | str = "cpu", mmap: bool = True):
        self._part = part
        self._device = device
        self._mmap = mmap
        self._pickled: dict[Path, dict[str, Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.as_stored(name)
        return tensor if name not in self._part.scales else tensor.float() * self.scale_of(name)

    def as_stored(self, name: str) -> Tensor:
        """The tensor as the file has it, without its scale."""
        return self._read_stored(self._part.names[name])

    def scale_of(self, name: str) -> Tensor:
        """The scale () of a tensor, fp32; 1 where it has none.

        Raises:
            ConfigError: It isn't a finite number of 0 or more.
        """
        if name not in self._part.scales:
            return torch.ones((), device=self._device)
        stored = self._part.scales[name]
        scale = self._read_stored(stored).float().reshape(())
        if not scale.is_meta and not (0 <= scale.item() < math.inf):
            raise ConfigError(f"{self._part.title}: the scale {stored} is {scale.item()}; download the file again")
        return scale

    def _read_stored(self, stored: str) -> Tensor:
        header = self._part.holder(stored)
        if header.format == "pickle" and torch.device(self._device).type != "meta":
            if header.path not in self._pickled:
                self._pickled[header.path] = load_pickle(header, mmap=self._mmap)
            return self._pickled[header.path][stored].to(self._device)
        return next(load_tensors(header, [stored], device=self._device, mmap=self._mmap))[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._part.names)

    def __len__(self) -> int:
        return len(self._part.names)


def _read(file: BinaryIO, header: Header, info: TensorInfo, mmap: bool) -> Tensor:
    dtype = torch_dtype(info.dtype)
    length = info.end - info.begin
    if length == 0:
        return torch.empty(info.shape, dtype=dtype)
    start = header.data_start + info.begin
    if mmap and start % dtype.itemsize == 0:
        # One private mapping per tensor: it is released with the tensor, and no mapping is as large as the file.
        page = start - start % memory_map.ALLOCATIONGRANULARITY
        mapped = memory_map.mmap(file.fileno(), start - page + length, access=memory_map.ACCESS_COPY, offset=page)
        return torch.frombuffer(mapped, dtype=dtype, offset=start - page, count=info.elements).view(info.shape)
    tensor = torch.empty(length, dtype=torch.uint8)
    file.seek(start)
    if file.readinto(tensor.numpy()) != length:  # type: ignore[attr-defined]
        raise OSError(f"{header.path} ended while it was read: it changed after its header was checked")
    return tensor.view(dtype).view(info.shape)


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """This writes a safetensors file atomically; equal contents give equal bytes.

    Tensors are moved to the CPU and converted one at a time.

    Args:
        tensors: What to write, by name.
        path: The file; it is replaced only when the new one is complete.
        metadata: Free text entries; both sides are strings.
        dtype: Type to convert floating-point tensors to; each keeps its own by default.

    Raises:
        ValueError: A number isn't finite (after conversion: fp16 overflows beyond 65504), a metadata value isn't a
            string, or a tensor has no data or a type that the format doesn't know.
    """

    def checked(name: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            raise ValueError(f"{name} has numbers that are not finite; {path} is not written")

    _write(tensors, path, metadata, dtype, checked)


def save_as_it_is(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """This writes a safetensors file for finding out what went wrong: numbers that aren't finite are welcome.

    Args:
        tensors: What to write, by name.
        path: The file; it is replaced only when the new one is complete.

    Raises:
        ValueError: A tensor has no data or a type that the format doesn't know.
    """
    _write(tensors, path, {}, None, lambda name, tensor: None)


def _write(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    check: Callable[[str, Tensor], None],
) -> None:
    if wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise ValueError(f"metadata values must be strings; {', '.join(sorted(wrong))} of {path} are not")
    stored = {name: dtype if dtype is not None and t.is_floating_point() else t.dtype for name, t in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_meta or stored[name] not in _FORMAT_NAMES:
            raise ValueError(f"{name} of {path} can't be saved: {tensor.dtype} on {tensor.device}")
    # Wide types first keep every tensor aligned, which mapping a file relies on.
    order = sorted(tensors, key=lambda name: (-stored[name].itemsize, name))
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(_header_bytes(tensors, stored, order, metadata))
        for name in order:
            tensor = tensors[name].detach().to(stored[name])
            check(name, tensor)
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _header_bytes(
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, torch.dtype],
    order: list[str],
    metadata: Mapping[str, str],
) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        end = position + tensors[name].numel() * stored[name].itemsize
        content[name] = {
            "dtype": _FORMAT_NAMES[stored[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor of any type are finite."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # few operations know fp8
        tensor = tensor.float()
    # Infinite numbers are extremes and NaN makes both extremes NaN; this is many times faster than torch.isfinite.
    return all(math.isfinite(extreme) for extreme in torch.stack(tensor.aminmax()).tolist())
