"""torch.compile for a model's repeated blocks: all blocks that are built alike share what is compiled.

Blocks are compiled singly, each as what block swap and checkpointing wrap: what moves weights and activations stays
outside. What is compiled is a function of the block's class, and its weights are inputs of it, so that a model of many
blocks takes no more graphs than it has kinds of blocks: times those with and without gradients, with the adapter on and
off, for one picture and for several. Sizes of batches and of pictures are variables of a graph, or each has its own.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError

MANY = 64
"""Graphs from which on something compiles too often; a warning comes at each doubling."""

# torch would go back to uncompiled code after 8 graphs of a function, in silence; here the warnings speak.
_LIMIT = 1 << 16


class Compiling:
    """Compiles blocks and counts what it compiled.

    Args:
        backend: As torch knows it: ``inductor``; ``aot_eager`` and ``eager`` trace and run torch's own kernels.
        dynamic: Whether sizes of batches and pictures are variables of a graph; else each size has its own graph.
        warn: Told when there are suspiciously many graphs.

    Attributes:
        graphs: How many were compiled so far.
        seconds: How long that took; the backward pass's share may come later and isn't in it.
    """

    def __init__(self, backend: str, *, dynamic: bool, warn: Callable[[str], None]):
        self.graphs, self.seconds = 0, 0.0
        self._backend, self._dynamic, self._warn = backend, dynamic, warn
        self._compiled: dict[type, Callable[..., Any]] = {}
        _set_limits()

    def compile(self, blocks: Sequence[nn.Module]) -> None:
        """Wrap ``forward`` of blocks. Wrap before everything else does; nothing is compiled before it is called.

        Layers inside may get an adapter afterwards.

        Raises:
            ValueError: A block is wrapped already.
        """
        for block in blocks:
            if "forward" in block.__dict__:
                raise ValueError(f"a {type(block).__name__} is wrapped already; compile blocks first")
            kind = type(block)
            if kind not in self._compiled:
                dynamic = bool(self._dynamic)  # None would depend on the order in which sizes come
                self._compiled[kind] = torch.compile(kind.forward, backend=self._make, dynamic=dynamic)
            block.forward = partial(_run, self._compiled[kind], block)  # type: ignore[method-assign]

    @property
    def report(self) -> str:
        """What was compiled, for the log."""
        return f"compiled {self.graphs} graphs with {self._backend} in {self.seconds:,.0f} s"

    def _make(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        if self.graphs >= MANY and self.graphs & (self.graphs - 1) == 0:
            advice = "see which with TORCH_LOGS=recompiles" if self._dynamic else "remove --no-compile_dynamic"
            self._warn(f"--torch_compile: graph {self.graphs} is being compiled, so something differs often; {advice}")
        started = time.perf_counter()
        make = torch._dynamo.lookup_backend(self._backend)
        options = {"config_patches": _inductor_settings()} if self._backend == "inductor" else {}
        try:
            return make(graph, inputs, **options)
        finally:
            self.seconds += time.perf_counter() - started


def check_compiler(backend: str, device_type: str) -> None:
    """Find out whether this machine can compile.

    Args:
        backend: See ``Compiling``.
        device_type: ``cuda`` or ``cpu``.

    Raises:
        ConfigError: Something is missing.
    """
    if backend != "inductor":
        return
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("--torch_compile needs triton, which is missing; run `pip install triton`, or remove it")
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"--torch_compile needs a C++ compiler, and there is no {compiler}; install it (`apt install g++`), name "
            "another by the variable CXX, or remove the option"
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise ConfigError(
            "--torch_compile needs Python.h, which is missing; install it (`apt install python3-dev`), or remove the "
            "option"
        )


def _run(compiled: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if any(tensor.is_meta for tensor in tensors):  # shapes are asked for, not numbers
        return type(block).forward(block, *args, **kwargs)
    for tensor in tensors:
        if tensor.is_floating_point():  # its last dimension is the model's width, and no size of a picture
            torch._dynamo.mark_static(tensor, tensor.ndim - 1)
    return compiled(block, *args, **kwargs)


def _set_limits() -> None:
    settings: Any = torch._dynamo.config
    settings.recompile_limit = settings.accumulated_recompile_limit = _LIMIT
    settings.specialize_float = True  # else each graph is compiled once more, to find out that its floats are constants


def _inductor_settings() -> dict[str, Any]:
    """Dropout by torch's own generator, as without compiling; and where torch knows how, no choice by stopwatch.

    A resumed run must find the kernels that the first had, to end with the same bytes.
    """
    from torch._inductor import config

    wanted = {"fallback_random": True, "deterministic": True}
    return {name: value for name, value in wanted.items() if hasattr(config, name)}
