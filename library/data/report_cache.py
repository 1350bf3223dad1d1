"""How much cached latents, masks and text features take, before any of it is made."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.config.dataset import DatasetConfig
from library.config.run import RunConfig
from library.config.urls import is_remote
from library.data.buckets import Placement
from library.data.report_facts import has_mask
from library.records import LatentFormat, Sample


@dataclass(frozen=True)
class CacheNeeds:
    """What the caches of a run take, in bytes.

    Attributes:
        latents: Of the pictures, mirrored ones included.
        masks: Of the loss masks.
        texts: Of the text features, at most; None: not known.
        latents_on_disk: Whether latents and masks are kept in the folder, or in memory for this run.
        texts_on_disk: The same of text features.
        folder: Where the caches are kept.
        free: What is free on its disk; None: not known, for it is far away.
        stored: What the folder holds already, for this run or others.
    """

    latents: int
    masks: int
    texts: int | None
    latents_on_disk: bool
    texts_on_disk: bool
    folder: str
    free: int | None
    stored: int

    @property
    def on_disk(self) -> int:
        """What is kept in the folder."""
        return (self.latents + self.masks) * self.latents_on_disk + (self.texts or 0) * self.texts_on_disk

    @property
    def in_memory(self) -> int:
        """What is kept in memory."""
        return self.latents + self.masks + (self.texts or 0) - self.on_disk

    @property
    def fits(self) -> bool:
        """Whether the disk has room, what is stored already being part of it."""
        return self.free is None or self.on_disk <= self.free + self.stored


def cache_needs(
    config: RunConfig,
    samples: Sequence[Sample],
    placements: Sequence[Placement],
    validation: Sequence[Sample],
    validation_placements: Sequence[Placement],
    latents: LatentFormat,
    text_numbers: int = 0,
) -> CacheNeeds | None:
    """This adds up what the caches of a run take; None: it caches nothing.

    Equal pictures count once, as they are stored once. Of captions that change at every visit, all variants count.

    Args:
        config: What is cached, in which precision.
        samples: What is trained on.
        placements: One per training sample.
        validation: What the loss is measured on.
        validation_placements: One per validation sample.
        latents: Format of the family's latents.
        text_numbers: Numbers in the features of one caption; 0: not known.
    """
    caching = config.caching
    if not (caching.cache_latents or caching.cache_text_encoder_outputs):
        return None
    number_bytes = 4 if config.training.mixed_precision == "no" else 2
    everything = (*samples, *validation)
    latent_bytes = mask_bytes = 0
    if caching.cache_latents:
        positions, masked = _positions(config.datasets, everything, (*placements, *validation_placements), latents)
        latent_bytes = positions * latents.channels * (4 if caching.no_half_vae else number_bytes)
        mask_bytes = masked
    texts: int | None = 0
    if caching.cache_text_encoder_outputs:
        count = _captions(config.datasets, everything, caching.caption_variants)
        texts = count * text_numbers * number_bytes if text_numbers else None
    folder = config.cache_dir
    on_disk = caching.cache_latents_to_disk or caching.cache_text_encoder_outputs_to_disk
    local = on_disk and not is_remote(folder)
    return CacheNeeds(
        latents=latent_bytes,
        masks=mask_bytes,
        texts=texts,
        latents_on_disk=caching.cache_latents_to_disk,
        texts_on_disk=caching.cache_text_encoder_outputs_to_disk,
        folder=folder,
        free=_free_bytes(folder) if local else None,
        stored=_stored_bytes(folder) if local else 0,
    )


def _positions(
    datasets: Sequence[DatasetConfig],
    samples: Sequence[Sample],
    placements: Sequence[Placement],
    latents: LatentFormat,
) -> tuple[int, int]:
    """Positions of all latents, and of all masks."""
    entries: dict[tuple[str, Placement], int] = {}
    masks: dict[tuple[str, str, Placement], int] = {}
    for sample, placement in zip(samples, placements):
        subset = datasets[sample.dataset].subsets[sample.subset]
        height, width = latents.latent_size(placement.bucket)
        size = height * width * (2 if subset.flip_aug else 1)
        key = (sample.content, placement)
        entries[key] = max(size, entries.get(key, 0))
        if has_mask(sample, datasets):
            masks[sample.mask_content, sample.content, placement] = size
    return sum(entries.values()), sum(masks.values())


def _captions(datasets: Sequence[DatasetConfig], samples: Sequence[Sample], variants: int | None) -> int:
    """How many captions are encoded at most, the empty one among them."""
    versions: Mapping[tuple[tuple[str, ...], int, int], int] = {
        (sample.captions, sample.dataset, sample.subset): len(sample.captions) if variants is None else variants
        for sample in samples
    }
    return 1 + sum(versions.values())


def _free_bytes(folder: str) -> int | None:
    """What is free on the disk that the folder is on, or will be."""
    path = os.path.abspath(folder)
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _stored_bytes(folder: str) -> int:
    """What the folder holds."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:  # another run has just removed it
                continue
    return total
