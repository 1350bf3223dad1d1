"""Fills a store with what training will ask for: latents of pictures, features of captions.

Only what is missing is encoded, each key once. Pictures are read ahead by threads and results are written by another,
so that the device is kept busy. Entries hold exactly what the encoder returned, in its type: a run trains on the same
bytes whether they come from memory or from disk, and no rounding is added to what an encoder in the step would give.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from library.config.errors import ConfigError
from library.data.buckets import Placement
from library.data.cache_keys import LATENTS, latent_key, text_key
from library.data.images import load_pixels
from library.data.store import NonFiniteEntry, TensorStore
from library.records import Sample, TensorRecord

T = TypeVar("T")

_MOST_READERS = 8
_WRITES_UNDER_WAY = 2  # batches of results that may wait to be written, and so stay on the device


class Processes(Protocol):
    """The processes of a run, as accelerate's ``Accelerator`` describes them."""

    @property
    def process_index(self) -> int:
        """This process's number."""
        ...

    @property
    def num_processes(self) -> int:
        """How many there are."""
        ...

    def wait_for_everyone(self) -> None:
        """Returns once all processes have come here."""
        ...


@dataclass(frozen=True)
class LatentItem:
    """A picture whose latents are wanted.

    Attributes:
        key: Of the entry in the store.
        path: The picture's file.
        placement: How it is resized and cropped.
        flipped: Whether it is mirrored.
    """

    key: str
    path: str
    placement: Placement
    flipped: bool = False

    @classmethod
    def of(
        cls, sample: Sample, content: str, placement: Placement, *, flipped: bool, signature: Mapping[str, str]
    ) -> "LatentItem":
        """The item of a sample whose file has the hash ``content``; ``signature`` is the VAE's."""
        return cls(latent_key(content, placement, flipped, signature), sample.path, placement, flipped)

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.path + (" (mirrored)" if self.flipped else "")


@dataclass(frozen=True)
class CacheCounts:
    """What a store held and what was added.

    Attributes:
        present: Wanted entries that were there.
        encoded: Entries that this process encoded.
    """

    present: int
    encoded: int


def cache_latents(
    store: TensorStore,
    items: Iterable[LatentItem],
    encode: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    accelerator: Processes,
    load: Callable[[str, Placement, bool], Tensor] = load_pixels,
) -> CacheCounts:
    """Encodes the pictures whose latents the store doesn't have.

    A store that the processes share is filled by all of them, each with its share; a store in memory is filled by every
    process for itself, since each will need every picture. All processes must call this; it returns when all are done.

    Args:
        store: Where latents are kept. It is flushed, not closed.
        items: What is wanted; equal keys are encoded once.
        encode: Pictures (B, 3, H, W) in -1..1, on the CPU, to latents (B, C, h, w) on any device.
        batch_size: Pictures encoded at once.
        accelerator: The processes.
        load: Path, placement and mirroring to a picture (3, H, W).

    Returns:
        The counts.

    Raises:
        ConfigError: Latents are not finite, the device's memory is too small for ``batch_size``, or the disk is full.
    """
    wanted = {item.key: item for item in items}
    missing = store.missing(wanted)
    mine = [wanted[key] for key in _own_share(missing, store, accelerator)]
    # The largest first: if memory is short, it shows at once. Copies of one file lie side by side, for the disk's sake.
    mine.sort(key=lambda item: (-item.placement.bucket.area, item.placement.bucket, item.path, item.flipped))
    batches = list(_batches(mine, batch_size, lambda item: item.placement.bucket))

    def read(item: LatentItem) -> Tensor:
        try:
            return load(item.path, item.placement, item.flipped)
        except OSError as error:
            raise ConfigError(
                f"{item.path} can't be read any more: {error}. Put it back, or start the run again"
            ) from error

    pictures = _read_ahead(read, batches)

    def encode_batch(batch: Sequence[LatentItem]) -> Mapping[str, Tensor]:
        pixels = torch.stack(next(pictures))
        try:
            return {LATENTS: encode(pixels)}
        except torch.OutOfMemoryError as error:
            remedy = f"lower --vae_batch_size {batch_size}" if batch_size > 1 else "lower the dataset's resolution"
            raise ConfigError(
                f"out of memory while encoding {len(batch)} pictures of {batch[0].placement.bucket} at once; {remedy}"
            ) from error

    titles = {item.key: item.title for item in mine}
    with contextlib.closing(pictures):
        _fill(
            store,
            [(batch, [item.key for item in batch]) for batch in batches],
            encode_batch,
            _bar("latents", "img", len(wanted) - len(missing), len(mine), accelerator),
            lambda key: (
                f"the VAE's answer for {titles[key]} has numbers that are not finite; run it in fp32 with "
                "--no_half_vae, or look at this picture"
            ),
        )
    accelerator.wait_for_everyone()
    return CacheCounts(len(wanted) - len(missing), len(mine))


def cache_texts(
    store: TensorStore,
    captions: Iterable[str],
    encode: Callable[[Sequence[str]], TensorRecord],
    *,
    signature: Mapping[str, str],
    batch_size: int,
    accelerator: Processes,
) -> CacheCounts:
    """Encodes the captions whose features the store doesn't have; the empty caption is always among the wanted.

    Processes share the work as in ``cache_latents``.

    Args:
        store: Where features are kept. It is flushed, not closed.
        captions: What is wanted; equal captions are encoded once.
        encode: Captions to features (B, ...) on any device.
        signature: Everything besides the caption that shapes the features.
        batch_size: Captions encoded at once.
        accelerator: The processes.

    Returns:
        The counts.

    Raises:
        ConfigError: Features are not finite, the device's memory is too small for ``batch_size``, or the disk is full.
    """
    wanted = {text_key(caption, signature): caption for caption in ("", *captions)}
    missing = store.missing(wanted)
    mine = _own_share(missing, store, accelerator)
    batches = list(_batches(mine, batch_size, lambda key: None))

    def encode_batch(batch: Sequence[str]) -> Mapping[str, Tensor]:
        try:
            return encode([wanted[key] for key in batch]).tensors()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"out of memory while encoding {len(batch)} captions at once; lower --text_encoder_batch_size "
                f"{batch_size}, or let the text encoders run in --mixed_precision bf16"
            ) from error

    _fill(
        store,
        [(batch, batch) for batch in batches],
        encode_batch,
        _bar("text features", "caption", len(wanted) - len(missing), len(mine), accelerator),
        lambda key: (
            f"the text encoders' answer for the caption {wanted[key]!r} has numbers that are not finite; try another "
            "--mixed_precision (T5 overflows in fp16), or look at this caption"
        ),
    )
    accelerator.wait_for_everyone()
    return CacheCounts(len(wanted) - len(missing), len(mine))


def _own_share(missing: Sequence[str], store: TensorStore, accelerator: Processes) -> list[str]:
    """The keys that this process encodes.

    Shares follow from the key alone: when another process has begun to write before this one looked, what is missing
    differs between them, but nothing is left out or done twice.
    """
    if not store.shared:
        return list(missing)
    count, rank = accelerator.num_processes, accelerator.process_index
    return [key for key in missing if int(key[:8], 16) % count == rank]


def _batches(items: Sequence[T], size: int, group: Callable[[T], object]) -> Iterator[Sequence[T]]:
    """Runs of at most ``size`` neighbours of one group."""
    start = 0
    for end in range(1, len(items) + 1):
        if end == len(items) or end - start == size or group(items[end]) != group(items[start]):
            yield items[start:end]
            start = end


def _read_ahead(load: Callable[[T], Tensor], batches: Sequence[Sequence[T]]) -> Generator[list[Tensor], None, None]:
    """The items of each batch, loaded by threads a batch or more ahead."""
    if not batches:
        return
    readers = min(_MOST_READERS, os.cpu_count() or 1)
    items = (item for batch in batches for item in batch)
    with ThreadPoolExecutor(readers, thread_name_prefix="read") as pool:
        try:
            loading = deque(pool.submit(load, item) for item in islice(items, len(batches[0]) + 2 * readers))
            for batch in batches:
                loaded = []
                for _ in batch:
                    loaded.append(loading.popleft().result())
                    loading.extend(pool.submit(load, item) for item in islice(items, 1))
                yield loaded
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _bar(what: str, unit: str, present: int, to_do: int, accelerator: Processes) -> tqdm:
    """A progress bar on the first process, when there is something to do."""
    return tqdm(
        total=to_do,
        desc=f"{what}: {present} cached, {to_do} to encode",
        unit=unit,
        disable=to_do == 0 or accelerator.process_index != 0,
        dynamic_ncols=True,
    )


def _fill(
    store: TensorStore,
    batches: Iterable[tuple[Sequence[T], Sequence[str]]],
    encode: Callable[[Sequence[T]], Mapping[str, Tensor]],
    bar: tqdm,
    explain: Callable[[str], str],
) -> None:
    """Encodes batch after batch, given with its keys, and writes the results in the background.

    What was encoded is kept when something fails or the user stops the run.
    """
    with bar, ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        writing: deque[Future[None]] = deque()
        try:
            for batch, keys in batches:
                with torch.no_grad():
                    encoded = encode(batch)
                writing.append(writer.submit(_write, store, keys, encoded, explain))
                while len(writing) > _WRITES_UNDER_WAY:
                    writing.popleft().result()
                bar.update(len(batch))
            while writing:
                writing.popleft().result()
        finally:
            writer.shutdown(wait=True)
            store.flush()


def _write(
    store: TensorStore, keys: Sequence[str], encoded: Mapping[str, Tensor], explain: Callable[[str], str]
) -> None:
    rows = {name: tensor.detach().cpu() for name, tensor in encoded.items()}
    try:
        store.write({key: {name: tensor[row] for name, tensor in rows.items()} for row, key in enumerate(keys)})
    except NonFiniteEntry as error:
        raise ConfigError(explain(error.key)) from error
