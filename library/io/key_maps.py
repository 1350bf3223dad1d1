"""The same weights in two spellings: how tensors of ours are named and laid out in another tool's files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Operation = Literal["copy", "split", "swap", "squeeze", "split and squeeze"]


@dataclass(frozen=True)
class KeyMap:
    """One tensor of ours and what diffusers makes of it.

    Attributes:
        ours: Name in the single file, without prefix.
        theirs: Names in diffusers' file: several for ``split``, otherwise one.
        operation: ``split`` cuts the rows into equal parts, ``swap`` exchanges their halves, ``squeeze`` drops a 1x1
            kernel.
    """

    ours: str
    theirs: tuple[str, ...]
    operation: Operation


@dataclass(frozen=True)
class LayerMap:
    """One layer (weight and bias) of ours and its counterparts in diffusers, by module path."""

    ours: str
    theirs: tuple[str, ...]
    operation: Operation = "copy"


def tensor_maps(layers: Iterable[LayerMap]) -> Iterator[KeyMap]:
    """The tensors of layers that have a weight and a bias each."""
    for layer in layers:
        for kind in ("weight", "bias"):
            operation = "copy" if layer.operation == "squeeze" and kind == "bias" else layer.operation
            theirs = tuple(f"{name}.{kind}" for name in layer.theirs)
            yield KeyMap(f"{layer.ours}.{kind}", theirs, operation)


def to_diffusers(tensors: "Mapping[str, Tensor]", maps: Sequence[KeyMap]) -> "Iterator[tuple[str, Tensor]]":
    """This gives our tensors in diffusers' names and layouts, one at a time; most are views.

    Args:
        tensors: By our name. Each is looked up once, when its turn comes, so a mapping may load lazily.
        maps: Of the model: a family's ``key_maps``.

    Raises:
        ValueError: A tensor is missing, or one has no counterpart.
    """
    _check_names(tensors, {entry.ours for entry in maps})
    for entry in maps:
        yield from zip(entry.theirs, _outward(entry, tensors[entry.ours]))


def from_diffusers(tensors: "Mapping[str, Tensor]", maps: Sequence[KeyMap]) -> "Iterator[tuple[str, Tensor]]":
    """This is the inverse of ``to_diffusers``.

    Args:
        tensors: By diffusers' name. Each is looked up once, when its turn comes, so a mapping may load lazily.
        maps: Of the model: a family's ``key_maps``.

    Raises:
        ValueError: A tensor is missing, or one has no counterpart.
    """
    _check_names(tensors, {name for entry in maps for name in entry.theirs})
    for entry in maps:
        yield entry.ours, _inward(entry, [tensors[name] for name in entry.theirs])


def swap_halves(rows: "Tensor") -> "Tensor":
    """This exchanges the first and the second half of a tensor's rows; it is its own inverse."""
    import torch

    first, second = rows.chunk(2)
    return torch.cat([second, first])


def _outward(entry: KeyMap, tensor: "Tensor") -> "Sequence[Tensor]":
    if entry.operation == "split":
        return tensor.chunk(len(entry.theirs))
    if entry.operation == "split and squeeze":
        return tensor[:, :, 0, 0].chunk(len(entry.theirs))
    if entry.operation == "swap":
        return [swap_halves(tensor)]
    if entry.operation == "squeeze":
        return [tensor[:, :, 0, 0]]
    return [tensor]


def _inward(entry: KeyMap, parts: "Sequence[Tensor]") -> "Tensor":
    if entry.operation == "split":
        import torch

        return torch.cat(list(parts))
    if entry.operation == "split and squeeze":
        import torch

        return torch.cat(list(parts))[:, :, None, None]
    if entry.operation == "swap":
        return swap_halves(parts[0])
    if entry.operation == "squeeze":
        return parts[0][:, :, None, None]
    return parts[0]


def _check_names(names: Mapping[str, object], expected: set[str]) -> None:
    if missing := sorted(expected - set(names)):
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}; the file is incomplete")
    if unknown := sorted(set(names) - expected):
        raise ValueError(
            f"{len(unknown)} tensors have no counterpart, such as {unknown[0]}; the file is of another model"
        )
