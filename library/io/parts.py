"""One component of a model as it lies on disk: in a file of its own, among others in one file, or cut into shards."""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from library.config.documents import read_json
from library.config.errors import ConfigError
from library.io.header import Header, TensorInfo, read_header, require_file
from library.io.pickles import is_pickle, pickle_checksum, read_pickle_header

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_INDEX_SUFFIX = ".index.json"
_SAMPLED_ABOVE = 1 << 16
_SAMPLES, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class Part:
    """One component's tensors.

    Attributes:
        title: Where they lie, for messages: the path of the file or folder.
        headers: The files.
        names: The component's own tensor name -> its name in the file.
        layout: Whose names those are: ``single`` (the single file's) or ``diffusers``.
        scales: Weight that is stored in fp8, by the component's own name -> the name of its scale in the file
            (``library.io.scaled_fp8``).
        unused: Scales of activations, by their name in the file: left out.
    """

    title: str
    headers: tuple[Header, ...]
    names: Mapping[str, str]
    layout: str = "single"
    scales: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """What the files say about each tensor, by the component's own name."""
        return {name: self.header_of(name).tensors[stored] for name, stored in self.names.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by the component's own names."""
        return {name: info.shape for name, info in self.tensors.items()}

    def header_of(self, name: str) -> Header:
        """The file that holds the tensor that the component calls ``name``."""
        return self.holder(self.names[name])

    def holder(self, stored: str) -> Header:
        """The file that holds the tensor that is called ``stored`` there."""
        return self._holders[stored]

    @cached_property
    def _holders(self) -> dict[str, Header]:
        return {stored: header for header in self.headers for stored in header.tensors}


def read_weights(path: str | os.PathLike[str]) -> tuple[Header, ...]:
    """This reads the headers of the weights at ``path``.

    Args:
        path: A safetensors file, a checkpoint in torch's own format, an index of shards (``*.index.json``), or a folder
            that holds one of them under a name that diffusers or transformers gives. Where a folder has several, full
            precision goes before variants such as ``fp16``, and safetensors before pickles.

    Raises:
        ConfigError: There are none, or a file is unusable.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_file(path)
    if path.name.endswith(".json"):
        return _read_index(path)
    return (_read_file(path),)


def number_count(part: Part) -> int:
    """How many numbers a part's tensors have."""
    return sum(math.prod(shape) for shape in part.shapes.values())


def part_identity(part: Part) -> str:
    """This names the contents of a part, for the signature of what is computed with it; file names don't matter.

    Tensors up to 64 KiB count in full; of larger ones, the first and last 4 KiB and 14 blocks of that size evenly
    between them. A 16 GB file takes about a second. An edit that touches nothing but numbers between the blocks goes
    unnoticed; training, merging and conversion touch all numbers of a tensor. For pickles the archive's own checksums
    count. Scales of fp8 weights belong to the contents.

    Args:
        part: The component.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(part.names):
        info = part.tensors[name]
        digest.update(f"{name}:{info.dtype}:{','.join(map(str, info.shape))}\n".encode())
    for header in part.headers:
        own = sorted(name for name in part.names if part.header_of(name) is header)
        if header.format == "pickle":
            digest.update(pickle_checksum(header.path).encode())
            continue
        with open(header.path, "rb") as file:
            for name in own:
                info = part.tensors[name]
                for offset, length in _samples(info.end - info.begin):
                    file.seek(header.data_start + info.begin + offset)
                    digest.update(file.read(length))
    for name, stored in sorted(part.scales.items()):
        header = part.holder(stored)
        digest.update(f"scale of {name}\n".encode())
        if header.format == "pickle":  # its checksum is in already
            continue
        with open(header.path, "rb") as file:
            file.seek(header.data_start + header.tensors[stored].begin)
            digest.update(file.read(header.tensors[stored].end - header.tensors[stored].begin))
    return digest.hexdigest()


def _samples(length: int) -> list[tuple[int, int]]:
    if length <= _SAMPLED_ABOVE:
        return [(0, length)]
    last = length - _SAMPLE_BYTES
    return [(last * i // (_SAMPLES - 1), _SAMPLE_BYTES) for i in range(_SAMPLES)]


def _read_file(path: Path) -> Header:
    return read_pickle_header(path) if is_pickle(require_file(path)) else read_header(path)


def _read_index(path: Path) -> tuple[Header, ...]:
    try:
        holders: Mapping[str, str] = read_json(require_file(path))["weight_map"]
        files = sorted(set(holders.values()))
        if not all(type(name) is str and Path(name).name == name for name in files):
            raise ValueError("its shards must lie beside it")
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(f"{path} is not an index of shards: it has no weight_map") from error
    if absent := [name for name in files if not (path.parent / name).is_file()]:
        raise ConfigError(f"{path} names {absent[0]}, which is not there; download it again")
    headers = tuple(_read_file(path.parent / name) for name in files)
    stored = {header.path.name: header.tensors for header in headers}
    if lost := [name for name, file in holders.items() if name not in stored[file]]:
        raise ConfigError(f"{path} says that {holders[lost[0]]} holds {lost[0]}, and it does not; download both again")
    return headers


def _weights_file(folder: Path) -> Path:
    """The best of the folder's weights files."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    found = [(rank, name) for name in names if (rank := _rank(name)) is not None]
    if found:
        return folder / min(found)[1]
    loose = [name for name in names if name.endswith(".safetensors") and "-of-" not in name]
    if len(loose) == 1:
        return folder / loose[0]
    if len(loose) > 1:
        raise ConfigError(f"{folder} holds several weights files ({', '.join(loose[:3])}); name the one to use")
    if any("-of-" in name for name in names):
        raise ConfigError(f"{folder} holds shards without their {_INDEX_SUFFIX} file; download it too")
    raise ConfigError(f"{folder} holds no weights: no {_STEMS[0]}.safetensors, no {_STEMS[1]}.safetensors")


def _rank(name: str) -> tuple[int, int, int] | None:
    """How good a choice ``name`` is, smallest first; None: it is no whole set of weights under a usual name.

    ``model.safetensors``, ``model.fp16.safetensors``, ``model.safetensors.index.json``,
    ``model.safetensors.index.fp16.json``, and the same with ``bin``.
    """
    stem, *words = name.split(".")
    if stem not in _STEMS:
        return None
    for kind, suffix in enumerate(("safetensors", "bin")):
        if suffix not in words:
            continue
        rest = [word for word in words if word not in (suffix, "index", "json")]
        if any("-of-" in word for word in rest):
            return None
        is_index = "index" in words and words[-1] == "json"
        if len(rest) <= 1 and (is_index or words[-1] == suffix):
            return kind, len(rest), int(is_index)
    return None
