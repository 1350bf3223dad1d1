"""Checkpoints in torch's own format (.ckpt, .pt, .pth, .bin).

Their contents are listed by ``pickle_contents``, which calls nothing, so no code of the file ever runs. The tensors
themselves come from ``torch.load(weights_only=True)``, and only from a file that was listed without a complaint.
"""

import hashlib
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.errors import ConfigError
from library.config.messages import name_shown
from library.io.header import DTYPE_BITS, Header, TensorInfo, require_file
from library.io.pickle_contents import Global, Rebuild, Storage, read_contents

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "uint16": "U16", "uint32": "U32",
    "uint64": "U64",
}  # fmt: skip
"""The format's name for each storage class (older types) and dtype object (newer ones) of torch."""
_MOST_CONTENTS = 16 << 20
"""Bytes of the list of contents; ten thousand tensors have two millions."""

_MOST_DIRECTORY = 16 << 20
"""Bytes of a zip file's directory, which becomes ten times as much memory."""

_MAY_BE_SAFE = {"torch", "collections", "builtins", "__builtin__", "numpy", "_codecs"}
"""Packages of which torch's safe loading knows some classes; it refuses those of all others."""

_MOST_SIDES = 64
_ZIP_START = b"PK\x03\x04"
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether the file is in torch's own format, by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(16)
    # A safetensors file starts with the length of its JSON, whose first byte can be any.
    return start[8:9] != b"{" and start.startswith((_ZIP_START, b"\x80"))


def read_pickle_header(path: str | os.PathLike[str]) -> Header:
    """This lists the tensors of a checkpoint in torch's own format, without torch and without its data.

    A dictionary under ``state_dict`` is taken where there is one, else the tensors of the outermost dictionary.

    Args:
        path: The file.

    Raises:
        ConfigError: The file is missing, damaged, names code that torch's safe loading refuses, or holds no named
            tensors.
    """
    path = require_file(path)
    named: set[Global] = set()
    content = _contents(path, named)
    tensors = {name: value.info() for name, value in named_tensors(content, _Tensor).items()}
    if not tensors:
        raise ConfigError(f"{path} holds no named tensors")
    if foreign := sorted(f"{module}.{name}" for module, name in named if module.split(".")[0] not in _MAY_BE_SAFE):
        raise ConfigError(_unsafe(path, f" ({name_shown(foreign[0])})"))
    return Header(path, {}, tensors, -1, "pickle")


def check_pickle(path: str | os.PathLike[str]) -> None:
    """This checks that ``torch.load(weights_only=True)`` needs no more memory for a file than the file has bytes.

    Raises:
        ConfigError: The file is missing or damaged, or was made to fill the memory.
    """
    _contents(require_file(path), set())


def load_pickle(header: Header, *, mmap: bool) -> "dict[str, Tensor]":
    """This loads the tensors that ``header`` lists, with ``weights_only``.

    Args:
        header: From ``read_pickle_header``.
        mmap: Map the file rather than reading it; older files can't be mapped and are read.

    Raises:
        ConfigError: The file needs code to load, or is damaged.
    """
    import torch

    size = header.path.stat().st_size
    if too_large := next((name for name, info in header.tensors.items() if info.end > size), None):
        raise ConfigError(
            f"{header.path} is damaged: its {name_shown(too_large)} is larger than the file; download it again"
        )
    try:
        content = torch.load(
            header.path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(header.path)
        )
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
            raise ConfigError(_unsafe(header.path, "")) from error
        raise ConfigError(_damaged(header.path, error)) from error
    return named_tensors(content, torch.Tensor)


def named_tensors(content: Any, kind: type) -> dict[str, Any]:
    """The values of class ``kind`` in a checkpoint, by name."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, kind)}


def pickle_checksum(path: Path) -> str:
    """A checksum of the whole file's contents, taken from its own directory where it has one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = sorted((info.filename.partition("/")[2], info.CRC, info.file_size) for info in archive.infolist())
        return hashlib.sha256(repr(entries).encode()).hexdigest()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} is a damaged or truncated checkpoint ({reason}); download it again"


def _unsafe(path: Path, what: str) -> str:
    return f"{path} can't be loaded safely: it contains more than tensors{what}. Convert it to safetensors first"


def _contents(path: Path, named: set[Global]) -> Any:
    """What the file lists; ``named`` gets the classes and functions in it."""
    try:
        return _read_zip(path, named) if zipfile.is_zipfile(path) else _read_legacy(path, named)
    except (
        ValueError,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise ConfigError(_damaged(path, error)) from error


def _read_zip(path: Path, named: set[Global]) -> Any:
    _check_directory(path)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if not names:
            raise ConfigError(f"{path} is a zip file, but no checkpoint: it has no data.pkl inside")
        if len(names) > 1:
            raise ConfigError(f"{path} has several lists of contents (data.pkl); download it again")
        entries = archive.infolist()
        stored = sum(entry.file_size for entry in entries)
        packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:
            raise ConfigError(
                f"{path} is a compressed zip file, which torch doesn't write and which can unpack to any size; convert "
                "it to safetensors first"
            )
        if stored > path.stat().st_size:
            raise ConfigError(f"{path} is damaged: its parts are larger than the file; download it again")
        with archive.open(names[0]) as file:
            data = file.read(_MOST_CONTENTS + 1)
    if len(data) > _MOST_CONTENTS:
        raise ConfigError(f"{path}: its list of contents is longer than any model's; convert it to safetensors first")
    return read_contents(BytesIO(data), _REBUILD, named)


def _check_directory(path: Path) -> None:
    """The zip file's directory must be of a size that one can hold in memory; its end says how large it is."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - (1 << 16) - 22))
        end = file.read()
    start = end.rfind(b"PK\x05\x06")
    (directory,) = struct.unpack_from("<I", end, start + 12) if start >= 0 else (0,)
    if directory == 0xFFFFFFFF:
        start = end.rfind(b"PK\x06\x06")
        (directory,) = struct.unpack_from("<Q", end, start + 40) if start >= 0 else (0,)
    if directory > _MOST_DIRECTORY:
        raise ConfigError(f"{path} is a zip file of more parts than any model has; convert it to safetensors first")


def _read_legacy(path: Path, named: set[Global]) -> Any:
    """Before torch 1.6: magic number, protocol, system facts, then the content, each pickled on its own."""
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY_START))
        if start.startswith(_ZIP_START):
            raise ConfigError(f"{path} is a truncated checkpoint: its end is missing; download it again")
        if start != _LEGACY_START:
            raise ConfigError(f"{path} is a pickle file, but not one that torch saved")
        rest = BytesIO(file.read(_MOST_CONTENTS))
    for _ in range(2):
        read_contents(rest, _REBUILD, named)
    return read_contents(rest, _REBUILD, named)


class _Tensor:
    """What the file says about one tensor."""

    def __init__(self, dtype: str, shape: Any):
        if type(shape) is not tuple or len(shape) > _MOST_SIDES:
            raise ValueError("a tensor without a shape")
        if not all(type(side) is int and 0 <= side < 2**63 for side in shape):
            raise ValueError("a tensor of a size that can't be")
        self.dtype = dtype
        self.shape = shape

    def info(self) -> TensorInfo:
        info = TensorInfo(self.dtype, tuple(self.shape), 0, 0)
        return info._replace(end=info.elements * DTYPE_BITS.get(self.dtype, 0) // 8)


def _stored_as(storage: Any) -> str:
    """The type of a storage, which its key has in its second place: ("storage", class, key, location, elements)."""
    key = storage.key if type(storage) is Storage else ()
    kind = key[1] if type(key) is tuple and len(key) > 1 else None
    return _dtype(kind)


def _dtype(kind: Any) -> str:
    name = kind.name if type(kind) is Global else kind
    if type(name) is not str:
        raise ValueError("a tensor without a type")
    return _DTYPES.get(name, name)


def _rebuild_v2(arguments: Sequence[Any]) -> _Tensor:
    storage, _, shape, *_ = arguments
    return _Tensor(_stored_as(storage), shape)


def _rebuild_v3(arguments: Sequence[Any]) -> _Tensor:
    _, _, shape, _, _, _, dtype, *_ = arguments
    return _Tensor(_dtype(dtype), shape)


_REBUILD: Mapping[Global, Rebuild] = {
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    Global("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    Global("torch._utils", "_rebuild_parameter"): lambda arguments: arguments[0],
}
