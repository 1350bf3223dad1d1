"""Fills a store with what training will ask for: latents and masks of pictures, features of captions.

Only what is missing is made, each key once. Files are read ahead by threads and results are written by another, so that
the device is kept busy. Entries hold exactly what the encoder returned, in its type: a run trains on the same bytes
whether they come from memory or from disk, and no rounding is added to what an encoder in the step would give.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from library.config.errors import ConfigError
from library.data.cache_keys import LATENTS, MASK, text_key
from library.data.store import TensorStore
from library.records import TensorRecord, stack_rows
from library.training.read_pictures import LatentItem, Loaded, Task, read_ahead
from library.training.write_behind import Entries, write_behind

T = TypeVar("T")

_MOST_TOGETHER = 256  # masks alone are written in such batches


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
class CacheCounts:
    """What a store held and what was added.

    Attributes:
        present: Wanted entries of latents or text that were there.
        encoded: Entries of them that this process encoded.
        bad: Content of a picture or mask that can't be decoded -> why, of all processes.
    """

    present: int
    encoded: int
    bad: Mapping[str, str] = field(default_factory=dict)


def cache_latents(
    latents: TensorStore,
    masks: TensorStore,
    items: Sequence[LatentItem],
    encode: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    accelerator: Processes,
) -> CacheCounts:
    """Encodes the pictures whose latents the store doesn't have, and makes the masks that theirs doesn't.

    Pictures and masks that can't be decoded are left out and listed in what is returned; everything else is done.

    A store that the processes share is filled by all of them, each with its share; a store in memory is filled by every
    process for itself, since each will need every picture. All processes must call this; it returns when all are done.

    Args:
        latents: Where latents are kept. It is flushed, not closed.
        masks: Where masks are kept, likewise.
        items: What is wanted; equal keys are made once.
        encode: Pictures (B, 3, H, W) in -1..1, on the CPU, to latents (B, C, h, w) on any device.
        batch_size: Pictures encoded at once.
        accelerator: The processes.

    Raises:
        ConfigError: A file is gone or changed, latents are not finite, the device's memory is too small for
            ``batch_size``, or the disk is full. What was encoded by then is kept.
    """
    missing = latents.missing(dict.fromkeys(item.key for item in items))
    missing_masks = masks.missing(dict.fromkeys(item.mask_key for item in items if item.mask is not None))
    tasks = _own_share(
        _tasks(items, set(missing), set(missing_masks)), lambda task: task.item.content, latents, accelerator
    )
    tasks.sort(key=Task.order)
    encoded, bad = 0, dict[str, str]()
    titles = {task.item.key: task.item.title for task in tasks}

    def explain(key: str) -> str:
        return (
            f"the VAE's answer for {titles[key]} has numbers that are not finite; run it in fp32 with --no_half_vae, "
            "or look at this picture"
        )

    present = len({item.key for item in items}) - len(missing)
    to_encode = sum(task.latents for task in tasks)
    what = f"latents: {present} cached, {to_encode} to encode"
    if to_encode < len(tasks):
        what += f"; masks: {len(tasks) - to_encode} more to make"
    bar = _bar(what, "img", len(tasks), accelerator)
    loaded = read_ahead(tasks, batch_size)
    with bar, contextlib.closing(loaded), write_behind(explain, latents, masks) as write:
        for batch in _batches(loaded, batch_size, bar):
            if any(one.mask is not None for one in batch):
                write(masks, functools.partial(_masks_of, batch))
            whole = [one for one in batch if one.pixels is not None]
            if whole:
                write(latents, _encode_pictures(whole, encode, batch_size))
            encoded += len(whole)
            bad.update(problem for one in batch for problem in one.bad.items())
    accelerator.wait_for_everyone()
    return CacheCounts(present, encoded, _of_all(bad, accelerator))


def cache_texts(
    store: TensorStore,
    captions: Iterable[str],
    encode: Callable[[Sequence[str]], TensorRecord],
    pack: Callable[[TensorRecord, int], Mapping[str, Tensor]],
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
        pack: Features, on the CPU, and a row -> what is stored for it.
        signature: Everything besides the caption that shapes the features.
        batch_size: Captions encoded at once.
        accelerator: The processes.

    Raises:
        ConfigError: Features are not finite, the device's memory is too small for ``batch_size``, or the disk is full.
    """
    wanted = {text_key(caption, signature): caption for caption in ("", *captions)}
    missing = store.missing(wanted)
    mine = _own_share(missing, lambda key: key, store, accelerator)
    present = len(wanted) - len(missing)

    def explain(key: str) -> str:
        return (
            f"the text encoders' answer for the caption {wanted[key]!r} has numbers that are not finite; try another "
            "--mixed_precision (T5 overflows in fp16), or look at this caption"
        )

    bar = _bar(f"text features: {present} cached, {len(mine)} to encode", "caption", len(mine), accelerator)
    with bar, write_behind(explain, store) as write:
        for start in range(0, len(mine), batch_size):
            keys = mine[start : start + batch_size]
            try:
                with torch.no_grad():
                    text = encode([wanted[key] for key in keys])
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"out of memory while encoding {len(keys)} captions at once; lower --text_encoder_batch_size "
                    f"{batch_size}, or let the text encoders run in --mixed_precision bf16"
                ) from error
            write(store, functools.partial(_packed, text, keys, pack))
            bar.update(len(keys))
    accelerator.wait_for_everyone()
    return CacheCounts(present, len(mine))


def _tasks(items: Sequence[LatentItem], missing: set[str], missing_masks: set[str]) -> Iterator[Task]:
    """What is to be made, each key once; the sets are emptied on the way."""
    for item in items:
        task = Task(item, item.key in missing, item.mask_key in missing_masks)
        if task.latents or task.mask:
            missing.discard(item.key)
            missing_masks.discard(item.mask_key)
            yield task


def _own_share(work: Iterable[T], identity: Callable[[T], str], store: TensorStore, accelerator: Processes) -> list[T]:
    """The part of the work that this process does.

    Shares follow from an identity, a hash in hexadecimal, alone: when another process has begun to write before this
    one looked, what is missing differs between them, but nothing is left out or done twice.
    """
    if not store.shared:
        return list(work)
    count, rank = accelerator.num_processes, accelerator.process_index
    return [one for one in work if int(identity(one)[:8], 16) % count == rank]


def _batches(loaded: Iterable[Loaded], size: int, bar: tqdm) -> Iterator[list[Loaded]]:
    """Batches of one resolution with ``size`` pictures to encode, and what else was read on the way."""
    for _, same_size in groupby(loaded, key=lambda one: one.task.item.placement.bucket):
        batch: list[Loaded] = []
        pictures = 0
        for one in same_size:
            batch.append(one)
            pictures += one.pixels is not None
            if pictures == size or len(batch) - pictures >= _MOST_TOGETHER:
                yield batch
                bar.update(len(batch))
                batch, pictures = [], 0
        if batch:
            yield batch
            bar.update(len(batch))


def _masks_of(batch: Sequence[Loaded]) -> Entries:
    return {one.task.item.mask_key: {MASK: one.placed(one.mask)} for one in batch if one.mask is not None}


def _encode_pictures(
    batch: Sequence[Loaded], encode: Callable[[Tensor], Tensor], batch_size: int
) -> Callable[[], Entries]:
    """Latents, as what to write: they are taken from the device by whoever writes them."""
    pixels = stack_rows([one.placed(one.pixels) for one in batch if one.pixels is not None])
    try:
        with torch.no_grad():
            encoded = encode(pixels)
    except torch.OutOfMemoryError as error:
        remedy = f"lower --vae_batch_size {batch_size}" if batch_size > 1 else "lower the dataset's resolution"
        bucket = batch[0].task.item.placement.bucket
        raise ConfigError(
            f"out of memory while encoding {len(batch)} pictures of {bucket} at once; {remedy}"
        ) from error

    def entries() -> Entries:
        return {one.task.item.key: {LATENTS: row} for one, row in zip(batch, encoded.detach().cpu())}

    return entries


def _packed(
    text: TensorRecord, keys: Sequence[str], pack: Callable[[TensorRecord, int], Mapping[str, Tensor]]
) -> Entries:
    on_host = text.from_tensors({name: tensor.detach().cpu() for name, tensor in text.tensors().items()})
    return {key: pack(on_host, row) for row, key in enumerate(keys)}


def _of_all(bad: Mapping[str, str], accelerator: Processes) -> Mapping[str, str]:
    """The bad pictures of all processes."""
    if accelerator.num_processes == 1 or not torch.distributed.is_initialized():
        return bad
    parts: list[Mapping[str, str]] = [{} for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather_object(parts, bad)
    return {content: problem for part in parts for content, problem in part.items()}


def _bar(what: str, unit: str, to_do: int, accelerator: Processes) -> tqdm:
    """A progress bar on the first process, when there is something to do."""
    return tqdm(
        total=to_do,
        desc=what,
        unit=unit,
        disable=to_do == 0 or accelerator.process_index != 0,
        dynamic_ncols=True,
    )
