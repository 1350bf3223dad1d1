"""Checkpoints in torch's own format (.ckpt, .pt, .pth, .bin).

Their contents are listed by an unpickler that knows tensors and nothing else: every other class it meets becomes an
inert placeholder, so no code of the file ever runs. The tensors themselves come from ``torch.load(weights_only=True)``.
"""

import hashlib
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from library.config.errors import ConfigError
from library.io.header import DTYPE_BITS, Header, TensorInfo, require_file

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
        ConfigError: The file is missing, damaged, or holds no named tensors.
    """
    path = require_file(path)
    try:
        content = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except ConfigError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ConfigError(_damaged(path, error)) from error
    tensors = {name: value.info() for name, value in named_tensors(content, _Tensor).items()}
    if not tensors:
        raise ConfigError(f"{path} holds no named tensors")
    return Header(path, {}, tensors, -1, "pickle")


def load_pickle(header: Header, *, mmap: bool) -> "dict[str, Tensor]":
    """This loads the tensors that ``header`` lists, with ``weights_only``.

    Args:
        header: From ``read_pickle_header``.
        mmap: Map the file rather than reading it; older files can't be mapped and are read.

    Raises:
        ConfigError: The file needs code to load, or is damaged.
    """
    import torch

    try:
        content = torch.load(
            header.path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(header.path)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        if "weights_only" in str(error):
            raise ConfigError(
                f"{header.path} can't be loaded safely: it contains more than tensors. Convert it to safetensors first"
            ) from error
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


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if not names:
            raise ConfigError(f"{path} is a zip file, but no checkpoint: it has no data.pkl inside")
        with archive.open(names[0]) as file:
            return _TensorLister(file).load()


def _read_legacy(path: Path) -> Any:
    """Before torch 1.6: magic number, protocol, system facts, then the content, each pickled on its own."""
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY_START))
        if start.startswith(_ZIP_START):
            raise ConfigError(f"{path} is a truncated checkpoint: its end is missing; download it again")
        if start != _LEGACY_START:
            raise ConfigError(f"{path} is a pickle file, but not one that torch saved")
        for _ in range(2):
            _TensorLister(file).load()
        return _TensorLister(file).load()


class _Tensor:
    """What the file says about one tensor."""

    def __init__(self, dtype: str, shape: tuple[int, ...]):
        self.dtype = dtype
        self.shape = shape

    def info(self) -> TensorInfo:
        info = TensorInfo(self.dtype, tuple(self.shape), 0, 0)
        return info._replace(end=info.elements * DTYPE_BITS.get(self.dtype, 0) // 8)


class _Ignored:
    """Stands for anything that isn't a tensor or a plain container."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Takes what a pickled list-like object is filled with."""

    def extend(self, values: Any) -> None:
        """See ``append``."""


class _TypeName(str):
    """A storage class or dtype of torch, by name."""


def _rebuild_v2(storage: str, offset: int, shape: tuple[int, ...], *rest: Any) -> _Tensor:
    return _Tensor(_DTYPES.get(storage, storage), shape)


def _rebuild_v3(
    storage: str, offset: int, shape: tuple[int, ...], stride: Any, grad: bool, hooks: Any, dtype: str, *rest: Any
) -> _Tensor:
    return _Tensor(_DTYPES.get(dtype, dtype), shape)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _TensorLister(pickle.Unpickler):
    def __init__(self, file: BinaryIO | Any):
        super().__init__(file, encoding="latin-1")

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and (name in _DTYPES or name == "UntypedStorage"):
            return _TypeName(name)
        return _KNOWN.get((module, name), _Ignored)

    def persistent_load(self, key: Any) -> str:
        return str(key[1])  # ("storage", class, key, location, elements)
