"""Whether two runs ended with the same bytes: weights, states, logged numbers and pictures in their output folders."""

import fnmatch
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.config.errors import ConfigError
from library.io.header import read_header
from library.io.manifest import MANIFEST
from library.io.safetensors import load_tensors
from library.training.state_files import AVERAGE, OPTIMIZER, PROGRESS, TRAINABLE

_OF_THE_CLOCK = ("ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date")
"""Metadata that tells when and by which process a file was written."""

# What was asked for rather than what came of it; who wrote it, and when.
_BESIDE_THE_RESULT = ("settings", "saved", "run")
_NOT_RESULTS = ("cache/*", "*-run.toml", f"*/{MANIFEST}")
_ONE_MORE_STOP = ("*-step????????-state/*",)
_CLOCKED_NUMBERS = ("*per_second*", "*seconds*", "*time*")

Leaf = Tensor | str | int | float | bool | None


class Difference(NamedTuple):
    """Something that is not equal.

    Attributes:
        kind: What it is of: weights, optimizer, ...
        place: File, and what inside it.
        amount: By how much it differs.
    """

    kind: str
    place: str
    amount: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}: {self.amount}"


@dataclass
class Comparison:
    """What was compared, and what differs.

    Attributes:
        differences: In the order in which they were found: what is trained comes first.
        equal: How many things of each kind are equal.
    """

    differences: list[Difference] = field(default_factory=list)
    equal: Counter[str] = field(default_factory=Counter)


def compare_runs(one: Path, other: Path) -> Comparison:
    """Compare the output folders of two runs.

    The clock and what was asked for (folders, intervals) may differ. The other run may have states of steps that the
    first one has none of, for it may have stopped there; every other file must be in both.

    Args:
        one: The run that others are measured by.
        other: The one that is to be equal to it.
    """
    comparison = Comparison()
    names, others = ({path.relative_to(folder).as_posix() for path in _files(folder)} for folder in (one, other))
    for name in sorted(names | others, key=_order):
        if name not in others:
            comparison.differences.append(Difference("files", name, f"is missing in {other}"))
        elif name in names:
            _compare_files(name, one / name, other / name, comparison)
        elif not any(fnmatch.fnmatch(name, pattern) for pattern in _ONE_MORE_STOP):
            comparison.differences.append(Difference("files", name, f"is missing in {one}"))
    return comparison


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in _NOT_RESULTS):
            yield path


def _order(name: str) -> tuple[int, str]:
    """What is trained first, then what trains it, then what comes of it."""
    kinds = (TRAINABLE, OPTIMIZER, AVERAGE, PROGRESS)
    file = name.rsplit("/", 1)[-1]
    return (kinds.index(file) if file in kinds else len(kinds), name)


def _compare_files(name: str, one: Path, other: Path, comparison: Comparison) -> None:
    leaves, others = contents(one), contents(other)
    if leaves is None or others is None:
        kind = "sample pictures" if "sample/" in name else "files"
        if one.read_bytes() == other.read_bytes():
            comparison.equal[kind] += 1
        else:
            comparison.differences.append(Difference(kind, name, "the bytes differ"))
        return
    theirs = dict.fromkeys(others)
    for key in [*leaves, *(key for key in theirs if key not in leaves)]:
        kind, place = _kind(name, key), f"{name}: {key}"
        if key not in leaves or key not in theirs:
            comparison.differences.append(Difference(kind, place, "is in one of them only"))
        elif amount := difference(leaves[key], others[key]):
            comparison.differences.append(Difference(kind, place, amount))
        else:
            comparison.equal[kind] += 1


def _kind(name: str, key: str) -> str:
    file = name.rsplit("/", 1)[-1]
    kinds = {TRAINABLE: "trained weights", AVERAGE: "moving average", PROGRESS: "progress"}
    if file == OPTIMIZER:
        return key.split("/")[0]
    if file.endswith(".jsonl"):
        return "logged numbers"
    return kinds.get(file, "saved weights")


class _Lazy(Mapping[str, Any]):
    """Tensors of a safetensors file, each read when it is looked up, and the file's metadata."""

    def __init__(self, path: Path):
        self._header = read_header(path)
        self._metadata = {
            f"metadata {name}": value
            for name, value in sorted(self._header.metadata.items())
            if name not in _OF_THE_CLOCK
        }

    def __getitem__(self, key: str) -> Any:
        if key in self._metadata:
            return self._metadata[key]
        return next(load_tensors(self._header, [key]))[1]

    def __iter__(self) -> Iterator[str]:
        yield from sorted(self._header.tensors)
        yield from self._metadata

    def __len__(self) -> int:
        return len(self._header.tensors) + len(self._metadata)


def contents(path: Path) -> Mapping[str, Any] | None:
    """What a file holds, by name; None where only its bytes can be compared.

    Raises:
        ConfigError: The file is damaged.
    """
    if path.suffix == ".safetensors":
        return _Lazy(path)
    try:
        if path.suffix in (".pt", ".pth"):
            return dict(_leaves(torch.load(path, map_location="cpu", weights_only=True, mmap=True)))
        if path.suffix == ".json" and path.name == PROGRESS:
            progress = json.loads(path.read_text(encoding="utf-8"))
            return dict(_leaves({key: value for key, value in progress.items() if key not in _BESIDE_THE_RESULT}))
        if path.suffix == ".jsonl":
            return _logged(path)
    except (ValueError, KeyError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{path}: damaged ({error})") from error
    return None


def _logged(path: Path) -> dict[str, Leaf]:
    """Every logged number, by its line's place in the file: lines that are there twice, or in another order, show."""
    numbers: dict[str, Leaf] = {}
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        entry = json.loads(line)
        step = entry.pop("step")
        numbers[f"line {place}"] = f"step {step}"
        for name, value in entry.items():
            if not any(fnmatch.fnmatch(name, pattern) for pattern in _CLOCKED_NUMBERS):
                numbers[f"step {step} {name} (line {place})"] = value
    return numbers


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Leaf]]:
    """The tensors and plain values of nested containers, by their paths; empty containers count."""
    items: Any = None
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    if items is None:
        yield path, value
        return
    if not len(value):
        yield path, f"{type(value).__name__} of nothing"
    for key, inner in items:
        yield from _leaves(inner, f"{path}/{key}" if path else str(key))


def difference(one: Leaf, other: Leaf) -> str:
    """In what two values differ, in words; empty where they are equal bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _tensor_difference(one, other)
    if type(one) is type(other) and repr(one) == repr(other):  # by repr: so that NaN equals NaN, and 0.0 isn't -0.0
        return ""
    if isinstance(one, float) and isinstance(other, float):
        return f"{one!r} and {other!r}, {abs(one - other):.3g} apart"
    return f"{_shown(one)} and {_shown(other)}"


def _tensor_difference(one: Tensor, other: Tensor) -> str:
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{_shown(one)} and {_shown(other)}"
    bits, others = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    if torch.equal(bits, others):
        return ""
    size = one.element_size()
    differing = int((bits != others).view(-1, size).any(dim=1).sum())
    apart = (one.double() - other.double()).abs().max().item()
    return f"{differing:,} of {one.numel():,} numbers differ, by up to {apart:.3g}"


def _shown(value: Leaf) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
