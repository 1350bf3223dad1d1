"""Reads the pictures that are to be encoded, and their masks, ahead of the encoder; each file is read once."""

import hashlib
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

from torch import Tensor

from library.config.dataset import SubsetConfig
from library.config.errors import ConfigError
from library.config.urls import is_remote
from library.data.buckets import Placement
from library.data.cache_keys import latent_key, mask_key
from library.data.images import PixelSettings, load_pixels
from library.data.mask_files import MaskFile
from library.data.masks import load_mask
from library.io.places import read_bytes
from library.records import Sample

_MOST_READERS = 8
_REMOTE_READERS = 16  # they are mostly waiting


class LatentItem(NamedTuple):
    """A picture whose latents are wanted, and its mask.

    Attributes:
        key: Of the latents in their store.
        path: The picture's file.
        content: Hash of the file's bytes.
        placement: How the picture is resized and cropped.
        flipped: Whether it is mirrored.
        settings: How its pixels are computed.
        mask: Where its mask comes from; None: it has none.
        mask_key: Of the mask in its store; empty without one.
        stride: Pixels per latent position.
    """

    key: str
    path: str
    content: str
    placement: Placement
    flipped: bool
    settings: PixelSettings
    mask: MaskFile | None
    mask_key: str
    stride: int

    @classmethod
    def of(
        cls,
        sample: Sample,
        subset: SubsetConfig,
        placement: Placement,
        *,
        flipped: bool,
        stride: int,
        signature: Mapping[str, str],
    ) -> "LatentItem":
        """The item of a sample; ``signature`` and ``stride`` are the VAE's."""
        settings, mask = PixelSettings.of(subset), MaskFile.of(sample, subset)
        return cls(
            key=latent_key(sample.content, placement, flipped, settings, signature),
            path=sample.path,
            content=sample.content,
            placement=placement,
            flipped=flipped,
            settings=settings,
            mask=mask,
            mask_key=""
            if mask is None
            else mask_key(mask.content, placement, flipped, alpha=mask.alpha, stride=stride),
            stride=stride,
        )

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.path + (" (mirrored)" if self.flipped else "")


@dataclass(frozen=True, slots=True)
class Task:
    """What is missing of an item.

    Attributes:
        item: The item.
        latents: Whether its latents are missing.
        mask: Whether its mask is missing.
    """

    item: LatentItem
    latents: bool
    mask: bool

    def order(self) -> tuple[object, ...]:
        """Where it stands among tasks: what is read from one file at one size lies side by side, large sizes first.

        If memory is short, it shows at once.
        """
        item = self.item
        bucket = item.placement.bucket
        return -bucket.area, bucket, item.path, item.placement, str(item.settings), str(item.mask), item.flipped


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was read for a task.

    Attributes:
        task: The task.
        pixels: The picture (3, H, W), upright; ``picture`` mirrors it. None: not wanted, or it can't be decoded.
        mask: Its mask (1, h, w), uint8, likewise.
        bad: Content of a file that can't be decoded -> why.
    """

    task: Task
    pixels: Tensor | None
    mask: Tensor | None
    bad: Mapping[str, str]

    def placed(self, values: Tensor) -> Tensor:
        """Pixels or a mask, mirrored where the item is."""
        return values.flip(-1) if self.task.item.flipped else values


def read_ahead(tasks: Sequence[Task], batch_size: int) -> Generator[Loaded, None, None]:
    """The tasks with what they need, in order, read by threads a batch or more ahead.

    Args:
        tasks: Sorted by ``Task.order``.
        batch_size: How many are used at once.

    Raises:
        ConfigError: A file is gone, or is another one than when the data was looked at.
    """
    if not tasks:
        return
    remote = any(is_remote(path) for path in {os.path.dirname(task.item.path) for task in tasks})
    readers = _REMOTE_READERS if remote else min(_MOST_READERS, os.cpu_count() or 1)
    jobs = _jobs(tasks)
    with ThreadPoolExecutor(readers, thread_name_prefix="read") as pool:
        try:
            loading = deque(pool.submit(_load, job) for job in islice(jobs, batch_size + 2 * readers))
            while loading:
                loaded = loading.popleft().result()
                loading.extend(pool.submit(_load, job) for job in islice(jobs, 1))
                yield from loaded
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _jobs(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """The tasks by picture and placement: mirrored or not, it is read and decoded once."""

    def picture(task: Task) -> tuple[object, ...]:
        return task.item.path, task.item.placement, task.item.settings, task.item.mask

    for _, job in groupby(tasks, key=picture):
        yield list(job)


def _load(job: Sequence[Task]) -> list[Loaded]:
    item, pixels, mask = job[0].item, None, None
    bad: dict[str, str] = {}
    wants_pixels = any(task.latents for task in job)
    source = item.mask if any(task.mask for task in job) else None
    data = _checked(item.path, item.content) if wants_pixels or (source is not None and source.alpha) else b""
    if wants_pixels:
        try:
            pixels = load_pixels(data, item.placement, False, item.settings)
        except OSError as error:
            bad[item.content] = _reason(error)
    if source is not None and not bad:
        data = data if source.alpha else _checked(source.path, source.content)
        try:
            mask = load_mask(data, item.placement, False, stride=item.stride, alpha=source.alpha)
        except OSError as error:
            bad[source.content] = _reason(error)
    return [Loaded(task, pixels if task.latents else None, mask if task.mask else None, bad) for task in job]


def _checked(path: str, content: str) -> bytes:
    """The bytes of a file, which must be those that were there when the data was looked at."""
    try:
        data = read_bytes(path)
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read any more: {_reason(error)}. Put it back, or start the run again"
        ) from error
    if hashlib.blake2b(data, digest_size=20).hexdigest() != content:
        raise ConfigError(f"{path} changed while the run started; start again")
    return data


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
