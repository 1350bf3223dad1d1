"""From the dataset configuration to batches: find pictures, cache what may be cached, plan, load."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from library.config.run import RunConfig
from library.data.buckets import Placement, place_all
from library.data.captions import possible_captions
from library.data.discovery import Discovery, discover
from library.data.file_index import FileIndex
from library.data.loader import BatchReader, make_loader
from library.data.plan import BatchPlan, MicroBatch
from library.data.store import MemoryStore, PackedStore, TensorStore
from library.families.protocols import ModelFamily, TextEncodingStrategy
from library.records import Batch, Sample
from library.training.caching import LatentItem, cache_latents, cache_texts
from library.training.validation import Validation


@dataclass(frozen=True)
class TrainingData:
    """The samples of a run and where they are placed.

    Attributes:
        discovery: What was found, with notes for the report.
        placements: One per training sample.
        validation_placements: One per validation sample.
    """

    discovery: Discovery
    placements: tuple[Placement, ...]
    validation_placements: tuple[Placement, ...]

    @property
    def contents(self) -> Mapping[str, str]:
        """File path -> content hash."""
        return self.discovery.contents

    def buckets(self, dataset: int) -> dict[str, int]:
        """Resolution -> visits per epoch, for one dataset."""
        counts: Counter[str] = Counter()
        for sample, placement in zip(self.discovery.samples, self.placements):
            if sample.dataset == dataset:
                counts[str(placement.bucket)] += sample.num_repeats
        return dict(counts)


def find_data(config: RunConfig, seed: int, *, resolution_step: int, largest_side: int | None = None) -> TrainingData:
    """Look at every picture once: sizes, content hashes, captions, buckets."""
    folder = config.cache_dir
    os.makedirs(folder, exist_ok=True)
    with tqdm(desc="looking at new pictures", unit="img", dynamic_ncols=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        discovery = discover(
            config.datasets,
            FileIndex(os.path.join(folder, "files.sqlite")),
            skip_bad_images=config.data.skip_bad_images,
            validation_seed=config.data.validation_seed if config.data.validation_seed is not None else seed,
            progress=progress,
        )

    def placed(samples: Sequence[Sample]) -> tuple[Placement, ...]:
        return place_all(samples, config.datasets, resolution_step, largest_side)

    return TrainingData(discovery, placed(discovery.samples), placed(discovery.validation))


def open_store(config: RunConfig, name: str, *, on_disk: bool) -> TensorStore:
    """The packed store called ``name`` in the cache folder, or one in memory."""
    return PackedStore(os.path.join(config.cache_dir, name)) if on_disk else MemoryStore()


def fill_latents(
    config: RunConfig,
    data: TrainingData,
    store: TensorStore,
    family: ModelFamily,
    vae: Callable[[], nn.Module],
    signature: Mapping[str, str],
    accelerator: Accelerator,
) -> None:
    """Encode every picture whose latents are not in the store, mirrored too where its subset flips.

    ``vae`` gives the VAE; it is asked only when something is missing.
    """
    items = []
    train = zip(data.discovery.samples, data.placements)
    held_out = zip(data.discovery.validation, data.validation_placements)
    for samples, may_flip in ((train, True), (held_out, False)):
        for sample, placement in samples:
            subset = config.datasets[sample.dataset].subsets[sample.subset]
            for flipped in (False, True) if may_flip and subset.flip_aug else (False,):
                content = data.contents[sample.path]
                items.append(LatentItem.of(sample, content, placement, flipped=flipped, signature=signature))

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        dtype = next(vae().parameters()).dtype
        return family.latents.encode(vae(), pixels.to(accelerator.device, dtype))

    cache_latents(store, items, encode, batch_size=config.caching.vae_batch_size, accelerator=accelerator)


def latent_signature(family: ModelFamily, dtype: torch.dtype) -> dict[str, str]:
    """What latents depend on besides the picture; ``dtype`` is the VAE's."""
    return {**family.latents.signature(), "dtype": str(dtype)}


def text_signature(text: TextEncodingStrategy, dtype: torch.dtype) -> dict[str, str]:
    """What text features depend on besides the caption; ``dtype`` is the encoders'."""
    return {**text.signature(), "dtype": str(dtype)}


def fill_texts(
    config: RunConfig,
    data: TrainingData,
    store: TensorStore,
    text: TextEncodingStrategy,
    encoders: Callable[[], Mapping[str, nn.Module]],
    signature: Mapping[str, str],
    accelerator: Accelerator,
    *,
    prompts: Sequence[str],
) -> None:
    """Encode every caption that can occur, and the sample ``prompts``, where they are not in the store.

    The empty caption is always among them. ``encoders`` gives the text encoders; it is asked only when something is
    missing.
    """
    captions = {""}
    for sample in (*data.discovery.samples, *data.discovery.validation):
        possible = possible_captions(sample.captions, config.datasets[sample.dataset].subsets[sample.subset])
        assert possible is not None, "the configuration refuses cached text for captions that change at every visit"
        captions.update(possible)

    def encode(batch: Sequence[str]) -> Any:
        with accelerator.autocast():
            return text.encode(encoders(), text.tokenize(batch).to(accelerator.device))

    # Prompts apart: a batch's company moves the last bits, and samples must not change the training.
    for wanted in (sorted(captions), prompts):
        cache_texts(
            store,
            wanted,
            encode,
            signature=signature,
            batch_size=config.caching.text_encoder_batch_size,
            accelerator=accelerator,
        )


def own_micro_batches(
    plan: BatchPlan, first_step: int, max_steps: int, *, rank: int, accumulation: int
) -> Iterator[MicroBatch]:
    """This process's micro-batches from ``first_step`` on."""
    for step in range(first_step, max_steps):
        yield from plan.step(step)[rank * accumulation : (rank + 1) * accumulation]


def loader(
    config: RunConfig, reader: BatchReader, micro_batches: Iterable[MicroBatch], accelerator: Accelerator
) -> Iterator[Batch]:
    """Batches made in worker processes ahead of the step."""
    return make_loader(
        reader,
        micro_batches,
        workers=config.data.loader_workers,
        persistent=config.data.persistent_data_loader_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def make_validation(config: RunConfig, data: TrainingData, reader: BatchReader, seed: int) -> Validation | None:
    """The validation set, read without augmentation; None when nothing is held out."""
    samples = data.discovery.validation
    if not samples:
        return None
    datasets = tuple(dataset.without_augmentation() for dataset in config.datasets)
    plan = BatchPlan(samples, data.validation_placements, datasets, seed=seed, micro_batches_per_step=1)
    steps = plan.steps_per_epoch
    limit = config.validation.max_validation_steps
    micro_batches = [plan.step(step)[0] for step in range(min(steps, limit) if limit else steps)]
    plain_reader = dataclasses.replace(
        reader, samples=samples, placements=data.validation_placements, datasets=datasets, seed=seed
    )
    return Validation(plain_reader, micro_batches, seed)
