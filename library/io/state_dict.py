"""Strict loading: every tensor of a module comes from the file, every tensor of the file has a place, shapes agree."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError

_NAMES_SHOWN = 3


_ALIGNMENT = 64
"""Bytes that torch aligns memory of the host to."""


def load_strict(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    source: str,
    keep_dtype: Sequence[str] = (),
) -> None:
    """This puts ``tensors`` in the place of the module's parameters and buffers, one at a time.

    The module is best built on the meta device: then nothing is held twice. Parameters that are shared inside the
    module stay shared, and any one of their names is enough. Buffers that are in no state dict are left alone.

    Args:
        module: What to fill.
        tensors: The module's own names, and the values.
        device: Where the values go.
        dtype: What floating-point values are converted to, fp8 among them; None: they stay as stored.
        source: Where the tensors come from, for the error.
        keep_dtype: Names whose values are not converted, unless they are stored in fp8.

    Raises:
        ConfigError: Names are missing or too many, or shapes differ. All of them are counted in one line.
    """
    places = module.state_dict(keep_vars=True)
    shared_names = _shared_names(places)
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors:
        is_first = name not in found
        _note(found, name, tuple(tensor.shape), places, shared_names)
        if is_first and name in places and found[name] == tuple(places[name].shape):
            keep = name in keep_dtype and tensor.dtype.itemsize > 1
            value = _converted(tensor, places[name], device, None if keep else dtype)
            for shared_name in shared_names[name]:
                _assign(module, shared_name, value)
    _refuse_difference(module, places, found, source)


def check_strict(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """This is ``load_strict``'s check, from names and shapes alone.

    Args:
        module: What would be filled.
        shapes: The module's own names, and the shapes that would come.
        source: Where they come from, for the error.

    Raises:
        ConfigError: See ``load_strict``.
    """
    places = module.state_dict(keep_vars=True)
    shared_names = _shared_names(places)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        _note(found, name, tuple(shape), places, shared_names)
    _refuse_difference(module, places, found, source)


def difference(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str | None:
    """This says in one line how two sets of named shapes differ; None: they don't.

    Args:
        expected: Names and shapes that are wanted.
        found: Names and shapes that are there.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [name for name in expected if name in found and tuple(expected[name]) != tuple(found[name])]
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(expected)} tensors missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if wrong:
        shapes = [f"{name} is {_size(found[name])}, not {_size(expected[name])}" for name in wrong]
        parts.append(f"{len(wrong)} of another shape ({_some(shapes)})")
    return "; ".join(parts) or None


def _shared_names(places: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Every name -> all names of the same tensor."""
    by_tensor: dict[int, list[str]] = {}
    for name, place in places.items():
        by_tensor.setdefault(id(place), []).append(name)
    return {name: by_tensor[id(place)] for name, place in places.items()}


def _note(
    found: dict[str, tuple[int, ...]],
    name: str,
    shape: tuple[int, ...],
    places: Mapping[str, Tensor],
    shared_names: Mapping[str, Sequence[str]],
) -> None:
    """Remembers what came for ``name`` and for the names of the same tensor; a wrong shape is never forgotten."""
    if name not in found or (name in places and shape != tuple(places[name].shape)):
        found.update(dict.fromkeys(shared_names.get(name, [name]), shape))


def _refuse_difference(
    module: nn.Module, places: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]], source: str
) -> None:
    problem = difference({name: tuple(place.shape) for name, place in places.items()}, found)
    if problem:
        raise ConfigError(f"{source} does not fit {type(module).__name__}: {problem}")


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:_NAMES_SHOWN]) + (", ..." if len(items) > _NAMES_SHOWN else "")


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape) or "a single number"


def _converted(tensor: Tensor, place: Tensor, device: Any, dtype: torch.dtype | None) -> Tensor:
    value = tensor.to(device)
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    value = _aligned(value)
    if isinstance(place, nn.Parameter):
        return nn.Parameter(value, requires_grad=place.requires_grad and value.is_floating_point())
    return value


def _aligned(value: Tensor) -> Tensor:
    """The same where torch itself would have put it; a file's pages may lie elsewhere.

    The CPU's kernels sum in another order over memory that isn't aligned, so that where a weight lies would show in
    the last bits of losses.
    """
    if value.device.type == "cpu" and value.data_ptr() % _ALIGNMENT:
        return value.clone()
    return value


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value
