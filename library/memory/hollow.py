"""Operations that compute nothing: tensors have shapes, types and memory of their own, and no numbers.

Inside ``Hollow`` the trainer's own code runs a step of a model of any size within seconds. Tensors are ordinary ones on
the host whose memory is reserved and never touched, so that autograd, autocast, modules and optimizers do what they do
with numbers. What an operation gives is asked of torch's meta device, once for each combination of shapes.
"""

import functools
import mmap
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ALIASES = {torch.ops.aten._unsafe_view.default, torch.ops.aten.lift_fresh.default}
"""What shares memory with its input though its signature doesn't say so."""

_SMALL = 1 << 16
"""Bytes up to which tensors are zeros: code may look into them, and must find the same each time."""

_ADDRESSES_ALONE = 0x4000 if sys.platform == "linux" else 0
"""Linux's ``MAP_NORESERVE``, which Python names from 3.13 on: the system sets no memory aside."""


class _Kind(NamedTuple):
    """What an operation's signature says.

    Attributes:
        looks: It gives another look at its input's memory.
        writes: Numbers and names of the arguments that it writes to.
        answers: How many things it gives.
        only_writes: All of them are arguments that it has written to.
        asks_where: It takes a device.
    """

    looks: bool
    writes: tuple[tuple[int, str], ...]
    answers: int
    only_writes: bool
    asks_where: bool


class _Layout(NamedTuple):
    """What memory a tensor has."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Hollow(TorchDispatchMode):
    """Inside, tensors get no numbers; one that is asked for its number says 1, or no."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """See ``TorchDispatchMode``."""
        return hollow(func, args, kwargs or {})


def hollow(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives inside ``Hollow``, for another dispatch mode that stands in its place."""
    if func is torch.ops.aten._local_scalar_dense.default:
        return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
    kind = _kind_of(func)
    if kind.looks:
        return func(*args, **kwargs)
    if kind.writes and kind.only_writes:
        written = [args[number] if number < len(args) else kwargs.get(name) for number, name in kind.writes]
        return None if not kind.answers else written[0] if kind.answers == 1 else tuple(written[: kind.answers])
    kwargs = dict(kwargs)
    if kwargs.get("generator") is not None:
        kwargs["generator"] = None  # of the host, and the meta device has none
    about_tensors = _has_tensor(args) or _has_tensor(kwargs.values())
    if "device" in kwargs or (kind.asks_where and not about_tensors):
        kwargs["device"] = torch.device("meta")
    elif not about_tensors:
        return func(*args, **kwargs)
    named = tuple((name, _laid_out(value)) for name, value in kwargs.items())
    return _reserved(_answer(func, tuple(map(_laid_out, args)), named, torch.get_default_dtype()))


@functools.lru_cache(maxsize=1 << 14)
def _answer(func: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], default: torch.dtype) -> Any:
    """What torch's meta device says, in layouts; ``default`` is the type of numbers that nobody gave one."""
    return _layouts(func(*map(_on_meta, args), **{name: _on_meta(value) for name, value in kwargs}))


@functools.cache
def _kind_of(func: Any) -> _Kind:
    schema = func._schema
    infos = [returned.alias_info for returned in schema.returns]
    looks = func in _ALIASES or any(info is not None and not info.is_write for info in infos)
    writes = tuple(
        (number, argument.name)
        for number, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    asks_where = any(argument.name == "device" for argument in schema.arguments)
    return _Kind(looks, writes, len(infos), all(info is not None for info in infos), asks_where)


def _has_tensor(values: Iterable[Any]) -> bool:
    return any(
        isinstance(value, Tensor) or (isinstance(value, list | tuple) and _has_tensor(value)) for value in values
    )


def _laid_out(value: Any) -> Any:
    """An argument as something that can be looked up, with layouts in the place of tensors; equal numbers of different
    types stay apart.
    """
    if isinstance(value, Tensor):
        return _Layout(value.size(), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return list, tuple(map(_laid_out, value))
    return type(value), value


def _on_meta(value: Any) -> Any:
    """The argument again, with tensors on the meta device in the place of layouts."""
    if isinstance(value, _Layout):
        return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device="meta")
    kind, content = value
    return list(map(_on_meta, content)) if kind is list else content


def _layouts(value: Any) -> Any:
    """An answer with layouts in the place of tensors."""
    if isinstance(value, Tensor):
        return _Layout(value.size(), value.stride(), value.dtype)
    return type(value)(map(_layouts, value)) if type(value) in (list, tuple) else value


def _reserved(value: Any) -> Any:
    """The same with tensors on the host in the place of layouts."""
    if isinstance(value, _Layout):
        return _tensor(value)
    return type(value)(map(_reserved, value)) if isinstance(value, list | tuple) else value


def _tensor(layout: _Layout) -> Tensor:
    size, stride, dtype = layout
    length = 0 if 0 in size else 1 + sum((count - 1) * step for count, step in zip(size, stride))
    if length * dtype.itemsize <= _SMALL:
        return torch.empty_strided(size, stride, dtype=dtype).zero_()
    if sys.platform == "win32":
        return torch.empty_strided(size, stride, dtype=dtype)
    # Not from malloc: it would take the memory of a whole model from its heap, which shrinks from its end alone, and a
    # process whose heap is larger than the machine can't be forked.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _ADDRESSES_ALONE
    room = mmap.mmap(-1, length * dtype.itemsize, flags=flags)
    return torch.frombuffer(room, dtype=dtype).as_strided(size, stride)
