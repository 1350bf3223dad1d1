"""Checkpointed blocks whose inputs wait on the host for the backward pass.

What a checkpointed block keeps is its inputs. Here they leave for the host as soon as the block has used them, and are
sent for again while the block after it goes through its backward pass.
"""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

_SMALLEST = 1 << 14  # bytes; below, the way takes longer than the memory is worth


class Stash(Protocol):
    """Where tensors wait on the host, and how they travel."""

    def put(self, tensor: Tensor) -> Any:
        """This begins to copy a tensor to the host; it may be dropped then. Returns what stands for it meanwhile."""
        ...

    def send_for(self, kept: Any) -> None:
        """This begins to copy a tensor back, unless that was done already."""
        ...

    def take(self, kept: Any) -> Tensor:
        """The tensor, back on its device, usable by what is computed from now on. The host's copy is given up."""
        ...


class ActivationOffload:
    """Runs blocks checkpointed, their inputs on the host meanwhile.

    Args:
        stash: Keeps the inputs.
        checkpoint: Runs a function of a block's inputs so that it keeps less.
    """

    def __init__(self, stash: Stash, checkpoint: Callable[..., Any]):
        self._stash, self._checkpoint = stash, checkpoint
        # Weak, because a graph may be dropped without a backward pass, and its inputs with it.
        self._waiting: list[weakref.ref[_Inputs]] = []

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The block's answer; its gradients are those of ``torch.utils.checkpoint`` without reentrance."""
        inputs = _Inputs(self._stash, args, kwargs, self._last())
        self._waiting.append(weakref.ref(inputs))
        return self._checkpoint(self._pass, forward, inputs)

    def _pass(self, forward: Callable[..., Any], inputs: "_Inputs") -> Any:
        if inputs.given is not None:
            args, kwargs = inputs.given
            answer = forward(*args, **kwargs)
            inputs.leave()
            return answer
        self._waiting = [ref for ref in self._waiting if ref() not in (None, inputs)]
        args, kwargs = inputs.come_back()
        if (before := self._last()) is not None:
            before.send_for()
        return forward(*args, **kwargs)

    def _last(self) -> "_Inputs | None":
        return self._waiting[-1]() if self._waiting else None


class _Inputs:
    """The inputs of one block in one pass."""

    def __init__(self, stash: Stash, args: tuple[Any, ...], kwargs: dict[str, Any], before: "_Inputs | None"):
        self.given: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        self._stash, self._names = stash, tuple(kwargs)
        values = [*args, *kwargs.values()]
        self._seen = [weakref.ref(value) for value in values if isinstance(value, Tensor)]
        shared = {id(one) for ref in (before._seen if before else ()) if (one := ref()) is not None}
        self._travels = [_worth_it(value) and id(value) not in shared for value in values]
        self._kept: list[Any] = []

    def leave(self) -> None:
        """Keep on the host only what is worth the way: not what is small, nor what all blocks share."""
        assert self.given is not None
        args, kwargs = self.given
        for value, travels in zip((*args, *kwargs.values()), self._travels):
            self._kept.append(self._stash.put(value.detach()) if travels else value)
        self.given = None

    def send_for(self) -> None:
        """Begin to bring the inputs back."""
        for kept, travels in zip(self._kept, self._travels):
            if travels:
                self._stash.send_for(kept)

    def come_back(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs again, for the recomputation; only once."""
        values = [
            self._stash.take(kept).requires_grad_() if travels else kept
            for kept, travels in zip(self._kept, self._travels)
        ]
        self._kept = []  # the recomputation holds what it needs
        count = len(values) - len(self._names)
        return tuple(values[:count]), dict(zip(self._names, values[count:]))


def _worth_it(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.nbytes >= _SMALLEST
