"""Reading cached samples at the sizes of SD3.5 at 1024 px: the loader, and plain reads of the same bytes."""

import contextlib
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.buckets import place_all
from library.data.cache_keys import LATENTS, latent_key, text_key
from library.data.images import PixelSettings
from library.data.loader import BatchReader, make_loader
from library.data.plan import BatchPlan
from library.data.store import PackedStore
from library.families.sd3.options import LATENTS as FORMAT
from library.families.sd3.text import Sd3Text
from library.randomness import Draws
from library.records import Resolution, Sample

_SIDE = 1024
_BATCH = 4
_SIGNATURE = {"bench": "1"}
_TEXT = {"clip": (77, 2048), "pooled": (2048,), "t5": (256, 4096)}


@dataclass(frozen=True)
class Stores:
    """Filled stores and who reads them.

    Attributes:
        reader: Makes batches.
        plan: Which ones.
        folders: Of the stores.
        bytes: Of all entries.
    """

    reader: BatchReader
    plan: BatchPlan
    folders: tuple[Path, ...]
    bytes: int


class StoredText:
    """As much of a text strategy as reading cached features needs."""

    def unpack(self, rows: Sequence[Mapping[str, Tensor]]) -> Sd3Text:
        """The batch of stored rows."""
        return Sd3Text.stack(rows)


def fill_stores(folder: Path, samples: int) -> Stores:
    """This writes random latents and text features in bf16.

    Args:
        folder: Made here.
        samples: How many.
    """
    subset = SubsetConfig(image_dir="pictures")
    dataset = DatasetConfig(resolution=Resolution(_SIDE, _SIDE), batch_size=_BATCH, subsets=(subset,))
    found = tuple(
        Sample(f"0/0/{i}", f"pictures/{i}.jpg", f"{i:040x}", (f"caption {i}",), Resolution(_SIDE, _SIDE), 0, 0)
        for i in range(samples)
    )
    placements = place_all(found, (dataset,), FORMAT.resolution_step)
    shape = (FORMAT.channels, *FORMAT.latent_size(Resolution(_SIDE, _SIDE)))
    latents, texts = PackedStore(folder / "latents"), PackedStore(folder / "text")
    written = 0
    for sample, placement in zip(found, placements):
        key = latent_key(sample.content, placement, False, PixelSettings.of(subset), _SIGNATURE)
        entry = {LATENTS: torch.randn(shape).bfloat16()}
        features = {name: torch.randn(size).bfloat16() for name, size in _TEXT.items()}
        latents.write({key: entry})
        texts.write({text_key(sample.captions[0], _SIGNATURE): features})
        written += sum(tensor.nbytes for tensor in (*entry.values(), *features.values()))
    latents.close()
    texts.close()
    reader = BatchReader(
        samples=found,
        placements=placements,
        datasets=(dataset,),
        seed=1,
        latent_format=FORMAT,
        text_strategy=cast(Any, StoredText()),
        latents=latents,
        latents_signature=_SIGNATURE,
        texts=texts,
        text_signature=_SIGNATURE,
    )
    plan = BatchPlan(found, placements, (dataset,), seed=1, micro_batches_per_step=1)
    return Stores(reader, plan, (folder / "latents", folder / "text"), written)


def loader_seconds(stores: Stores, workers: int, *, noise: bool) -> float:
    """One epoch through the loader, from its first batch on; starting the workers isn't counted.

    Args:
        stores: What is read.
        workers: Threads that read.
        noise: Whether each sample's noise is drawn.
    """
    with contextlib.nullcontext() if noise else mock.patch.object(Draws, "normal", lambda *_: torch.empty(0)):
        return _loader_seconds(stores, workers)


def _loader_seconds(stores: Stores, workers: int) -> float:
    steps = stores.plan.steps_per_epoch
    micro_batches = itertools.chain.from_iterable(stores.plan.step(step) for step in range(steps + 1))
    batches = make_loader(stores.reader, micro_batches, workers=workers)
    next(batches)
    started = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return time.perf_counter() - started


def plain_seconds(stores: Stores) -> float:
    """All bytes of the stores read once, in pieces of a sample's size, into one buffer."""
    buffer = bytearray(stores.bytes // len(stores.reader.samples))
    started = time.perf_counter()
    for folder in stores.folders:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.endswith(".safetensors"):
                with open(entry.path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
    return time.perf_counter() - started
