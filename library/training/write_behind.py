"""Writes results to a store in a thread of its own, while the next ones are computed."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from library.config.errors import ConfigError
from library.data.store import NonFiniteEntry, TensorStore

Entries = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, by the key of their entry."""

UNDER_WAY = 2
"""Batches of results that may wait to be written, and so stay on the device."""


@contextlib.contextmanager
def write_behind(
    explain: Callable[[str], str], *stores: TensorStore
) -> Generator[Callable[[TensorStore, Callable[[], Entries]], None], None, None]:
    """This gives a function that writes entries to a store in the background.

    The entries are made there too, by the function that it is given, so that taking them from the device holds nothing
    up. Where too many wait already, it waits. What was given to it is kept when something fails or the user stops the
    run; at the end the stores are flushed.

    Args:
        explain: The key of an entry whose numbers are not finite -> what to say of it.
        stores: The stores that will be written to.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="write") as thread, contextlib.ExitStack() as at_the_end:
        for store in stores:
            at_the_end.callback(store.flush)
        at_the_end.callback(thread.shutdown, wait=True)
        under_way: deque[Future[None]] = deque()

        def write(store: TensorStore, entries: Callable[[], Entries]) -> None:
            under_way.append(thread.submit(_write, store, entries, explain))
            while len(under_way) > UNDER_WAY:
                under_way.popleft().result()

        yield write
        while under_way:
            under_way.popleft().result()


def _write(store: TensorStore, entries: Callable[[], Entries], explain: Callable[[str], str]) -> None:
    try:
        store.write(entries())
    except NonFiniteEntry as error:
        raise ConfigError(explain(error.key)) from error
