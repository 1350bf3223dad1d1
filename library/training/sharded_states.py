"""The tensors of a run's state where the model is spread over processes: each process writes and reads its own parts.

They lie in a folder of torch.distributed.checkpoint, which keeps whole shapes: any number of processes can read it, and
so can a run whose model is not sharded. Names are ``weights/<name>``, ``optimizer/<name>/<what>``, ``average/<name>``.
"""

import contextlib
import os
import pickle
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from library.config.errors import ConfigError
from library.io.header import read_header
from library.io.safetensors import load_tensors
from library.training.optimizers import load_optimizer_state
from library.training.run import Run
from library.training.shards import as_whole, own_part, spread

SHARDED = "sharded"
"""The folder inside a state."""

_WEIGHTS, _OPTIMIZER, _AVERAGE = "weights/", "optimizer/", "average/"
# What torch's list of a checkpoint is made of. The list is a pickle, and a pickle may name any function to call.
_LISTED = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "PureWindowsPath"),
    ("collections", "OrderedDict"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
}


def is_sharded(folder: Path) -> bool:
    """Whether the state in ``folder`` was written by processes that had parts of the weights."""
    return (folder / SHARDED).is_dir()


def write(run: Run, target: Path) -> Path:
    """All processes: write the weights, the optimizer's tensors and the average, each process its parts.

    Args:
        run: The run.
        target: The state's folder, which need not exist.

    Returns:
        A complete folder beside ``target``, under a temporary name, to become ``SHARDED`` in the state.

    Raises:
        OSError: It can't be written; on all processes alike.
    """
    folder = Path(_from_main(run, _make_temporary(target) if run.accelerator.is_main_process else ""))
    try:
        writer = FileSystemWriter(folder)
        writer.fs = _Files()
        checkpoint.save(_tensors(run), storage_writer=writer)
    except CheckpointException as error:
        if run.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        raise _cause(error) from error
    return folder


def optimizer_rest(state: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer's state dict holds beside tensors."""
    kept = {
        number: {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        for number, values in state["state"].items()
    }
    return {**state, "state": kept}


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in a sharded state.

    Raises:
        ConfigError: It can't be read.
    """
    entries = _Reader(folder).entries()
    weights = {name: entry for name, entry in entries.items() if name.startswith(_WEIGHTS)}
    return {name.removeprefix(_WEIGHTS): tuple(entry.size) for name, entry in weights.items()}


def read(run: Run, folder: Path, optimizer_state: Mapping[str, Any], *, weights: str, average: str) -> None:
    """All processes: put the weights, the optimizer and the average back; the state or the run is sharded, or both.

    Args:
        run: The run.
        folder: The state.
        optimizer_state: The optimizer's state dict of the state's own file.
        weights: Name of the file with the weights in a state that is not sharded.
        average: Name of the file with their average.

    Raises:
        ConfigError: The state can't be read.
        ValueError: The optimizer's state is another one's.
    """
    if is_sharded(folder):
        optimizer_state = _read_sharded(run, folder, optimizer_state)
    else:
        optimizer_state = _spread_whole(run, folder, optimizer_state, weights=weights, average=average)
    load_optimizer_state(_optimizer(run), dict(optimizer_state))


def _read_sharded(run: Run, folder: Path, rest: Mapping[str, Any]) -> dict[str, Any]:
    reader = _Reader(folder)
    entries = reader.entries()
    tensors: dict[str, Tensor] = {f"{_WEIGHTS}{name}": value for name, value in _weights(run).items()}
    state: dict[int, dict[str, Any]] = {number: dict(values) for number, values in rest["state"].items()}
    places = {name: (number, parameter) for number, (name, parameter) in enumerate(_optimized(run))}
    for entry in entries:
        name, _, what = entry.removeprefix(_OPTIMIZER).rpartition("/")
        if entry.startswith(_OPTIMIZER) and name in places:
            number, parameter = places[name]
            tensors[entry] = _empty(entries[entry], parameter)
            state.setdefault(number, {})[what] = tensors[entry]
    tensors |= _average(run)
    if missing := sorted(set(tensors) - set(entries)):
        raise ConfigError(f"--resume {folder}: {SHARDED} lacks {missing[0]}; resume from another state")
    try:
        with warnings.catch_warnings():
            # one process alone needs no group to read; torch finds that worth a warning
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.load(tensors, storage_reader=reader)
    except CheckpointException as error:
        raise ConfigError(f"--resume {folder}: {SHARDED} can't be read ({_cause(error)})") from error
    return {**rest, "state": state}


def _spread_whole(run: Run, folder: Path, whole: Mapping[str, Any], *, weights: str, average: str) -> dict[str, Any]:
    own = _weights(run)
    with torch.no_grad():
        for name, value in load_tensors(read_header(folder / weights)):
            own_part(own[name]).copy_(own_part(spread(value, own[name])))
        if run.average is not None:
            averages, parameters = run.average.tensors(), dict(_optimized(run))
            for name, value in load_tensors(read_header(folder / average)):
                averages[name].copy_(own_part(spread(value, parameters[name])))
    state = {}
    parameters_in_order = [parameter for _, parameter in _optimized(run)]
    for number, values in whole["state"].items():
        like = parameters_in_order[number]
        state[number] = {
            name: spread(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
            for name, value in values.items()
        }
    return {**whole, "state": state}


def _tensors(run: Run) -> dict[str, Tensor]:
    """Everything that is written, by its name in the checkpoint."""
    tensors = {f"{_WEIGHTS}{name}": value for name, value in _weights(run).items()}
    states = _optimizer(run).state
    for name, parameter in _optimized(run):
        for what, value in states.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{name}/{what}"] = value
    return tensors | _average(run)


def _weights(run: Run) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in run.trainable.state_dict().items()}


def _average(run: Run) -> dict[str, Tensor]:
    if run.average is None:
        return {}
    parameters = dict(_optimized(run))
    return {f"{_AVERAGE}{name}": as_whole(value, parameters[name]) for name, value in run.average.tensors().items()}


def _optimized(run: Run) -> list[tuple[str, nn.Parameter]]:
    """What the optimizer changes, in its order, with names."""
    names = {id(parameter): name for name, parameter in run.trainable.named_parameters()}
    return [(names[id(parameter)], parameter) for parameter in run.parameters]


def _optimizer(run: Run) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    return inner


def _empty(entry: TensorStorageMetadata, parameter: nn.Parameter) -> Tensor:
    """Memory for a tensor of the optimizer's state: spread as its parameter is, unless it is of another shape."""
    if entry.size == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


class _Reader(FileSystemReader):
    """Reads a checkpoint whose list names nothing but tensors."""

    def __init__(self, folder: Path):
        super().__init__(folder / SHARDED)
        self._folder = folder

    def entries(self) -> dict[str, TensorStorageMetadata]:
        """The tensors by name."""
        listed: dict[str, Any] = self.read_metadata().state_dict_metadata
        other = next((name for name, entry in listed.items() if not isinstance(entry, TensorStorageMetadata)), None)
        if other is not None:
            raise ConfigError(f"--resume {self._folder}: {SHARDED} has {other}, which is no tensor; it isn't ours")
        return listed

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The list, once it is known to call nothing."""
        path = self._folder / SHARDED / ".metadata"
        try:
            with open(path, "rb") as file:
                _Listing(file).load()
            return super().read_metadata(*args, **kwargs)
        except (OSError, EOFError, ValueError, TypeError, AttributeError, IndexError, pickle.UnpicklingError) as error:
            raise ConfigError(f"--resume {self._folder}: {SHARDED}/.metadata can't be read ({error})") from error


class _Listing(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _LISTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _Files(FileSystem):
    """The file system, where a full disk is an ``OSError``: torch's zip writer only says that its position is odd."""

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            watched = _Watched(stream)
            try:
                yield watched
            except RuntimeError:
                if watched.error is not None:
                    raise watched.error from None
                raise


class _Watched:
    """A stream that remembers why it couldn't write."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> Any:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def _make_temporary(target: Path) -> str:
    """A new folder beside ``target``; or what the system said instead, after an exclamation mark."""
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return f"!{error.errno or 0}:{error.strerror}"
    return os.fspath(folder)


def _from_main(run: Run, text: str) -> str:
    """The main process's text, on all processes.

    Raises:
        OSError: It begins with an exclamation mark.
    """
    shared = [text]
    torch.distributed.broadcast_object_list(shared, src=0, device=run.device)
    if shared[0].startswith("!"):
        number, _, message = shared[0][1:].partition(":")
        raise OSError(int(number), message)
    return shared[0]


def _cause(error: CheckpointException) -> Exception:
    """What one of the processes met; an OSError wherever the system refused something."""
    met: list[Any] = [failure[0] for failure in error.failures.values()]
    first: Exception = next((one for one in met if isinstance(one, OSError)), met[0])
    return first if isinstance(first, OSError) else OSError(str(first))
