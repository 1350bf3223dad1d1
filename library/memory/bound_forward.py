"""A layer's ``forward`` with arguments of its own that torch.compile can share between layers."""

from collections.abc import Callable
from typing import Any


class BoundForward:
    """Calls a function with some arguments before the others, like ``functools.partial``.

    torch.compile takes each partial for something new, and compiles anew for each layer that has one. Into a method, as
    ``call`` is, it looks. Copying and pickling work as with a partial.

    Args:
        function: What is called.
        arguments: What it gets first.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._function, self._arguments = function, arguments

    def call(self, *args: Any) -> Any:
        """What the function answers."""
        return self._function(*self._arguments, *args)
