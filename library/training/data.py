"""From the dataset configuration to batches: find pictures, cache what may be cached, plan, load."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from library.config.run import RunConfig
from library.data.buckets import Placement, place_all
from library.data.captions import caption_versions
from library.data.discovery import Discovery, discover
from library.data.file_index import FileIndex
from library.data.loader import BatchReader, make_loader
from library.data.plan import BatchPlan, MicroBatch
from library.data.store import MemoryStore, PackedStore, TensorStore
from library.families.protocols import ModelFamily, TextEncodingStrategy
from library.io.places import join
from library.records import Batch, Sample, TensorRecord
from library.training.caching import cache_latents, cache_texts
from library.training.read_pictures import LatentItem
from library.training.sharding import padded
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

    def buckets(self, dataset: int) -> dict[str, int]:
        """Resolution -> visits per epoch, for one dataset."""
        counts: Counter[str] = Counter()
        for sample, placement in zip(self.discovery.samples, self.placements):
            if sample.dataset == dataset:
                counts[str(placement.bucket)] += sample.num_repeats
        return dict(counts)


def find_data(config: RunConfig, seed: int, *, resolution_step: int, largest_side: int | None = None) -> TrainingData:
    """Look at every file once: sizes, content hashes, captions, masks; and choose the buckets.

    Pictures whose latents are cached are decoded then, and not here.
    """
    os.makedirs(config.local_cache_dir, exist_ok=True)
    with tqdm(desc="looking at new pictures", unit="img", dynamic_ncols=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        discovery = discover(
            config.datasets,
            file_index(config),
            skip_bad_images=config.data.skip_bad_images,
            validation_seed=config.data.validation_seed if config.data.validation_seed is not None else seed,
            decode=not config.caching.cache_latents,
            steered=config.control_net is not None,
            near_duplicates=config.data.report_near_duplicates,
            progress=progress,
        )

    def placed(samples: Sequence[Sample]) -> tuple[Placement, ...]:
        return place_all(samples, config.datasets, resolution_step, largest_side)

    return TrainingData(discovery, placed(discovery.samples), placed(discovery.validation))


def file_index(config: RunConfig) -> FileIndex:
    """What is known about the files of all runs that share the cache."""
    return FileIndex(os.path.join(config.local_cache_dir, "files.sqlite"))


def open_store(config: RunConfig, name: str, *, on_disk: bool) -> TensorStore:
    """The packed store called ``name`` in the cache, or one in memory."""
    return PackedStore(join(config.cache_dir, name), config.local_cache_dir) if on_disk else MemoryStore()


def fill_latents(
    config: RunConfig,
    data: TrainingData,
    latents: TensorStore,
    masks: TensorStore,
    family: ModelFamily,
    vae: Callable[[], nn.Module],
    signature: Mapping[str, str],
    accelerator: Accelerator,
) -> Mapping[str, str]:
    """Encode every picture whose latents are not in the store, mirrored too where its subset flips; and make masks.

    ``vae`` gives the VAE; it is asked only when something is missing.

    Returns:
        Content of pictures and masks that can't be decoded -> why, of all processes. All others are stored.
    """
    items = list(latent_items(config, data, family, signature))

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        dtype = next(vae().parameters()).dtype
        return family.latents.encode(vae(), pixels.to(accelerator.device, dtype))

    batch_size = config.caching.vae_batch_size
    return cache_latents(latents, masks, items, encode, batch_size=batch_size, accelerator=accelerator).bad


def latent_items(
    config: RunConfig, data: TrainingData, family: ModelFamily, signature: Mapping[str, str]
) -> Iterator[LatentItem]:
    """Every picture whose latents training and validation can ask for; ``signature`` is the VAE's."""
    train = zip(data.discovery.samples, data.placements)
    held_out = zip(data.discovery.validation, data.validation_placements)
    for samples, may_flip in ((train, True), (held_out, False)):
        for sample, placement in samples:
            subset = config.datasets[sample.dataset].subsets[sample.subset]
            for flipped in (False, True) if may_flip and subset.flip_aug else (False,):
                yield LatentItem.of(
                    sample,
                    subset,
                    placement,
                    flipped=flipped,
                    stride=family.latents.format.stride,
                    signature=signature,
                )


def latent_signature(family: ModelFamily, dtype: torch.dtype) -> dict[str, str]:
    """What latents depend on besides the picture; ``dtype`` is the VAE's."""
    return {**family.latents.signature(), "dtype": str(dtype)}


def text_signature(text: TextEncodingStrategy, dtype: torch.dtype) -> dict[str, str]:
    """What text features depend on besides the caption; ``dtype`` is the encoders'."""
    return {**text.signature(), "dtype": str(dtype)}


def fill_texts(
    config: RunConfig,
    wanted: Sequence[str],
    store: TensorStore,
    text: TextEncodingStrategy,
    encoders: Callable[[], Mapping[str, nn.Module]],
    signature: Mapping[str, str],
    accelerator: Accelerator,
) -> None:
    """Encode the texts that are not in the store. ``encoders`` is asked for only when something is missing."""

    def encode(batch: Sequence[str]) -> TensorRecord:
        with accelerator.autocast():
            return text.encode(encoders(), text.tokenize(batch).to(accelerator.device))

    cache_texts(
        store,
        wanted,
        encode,
        text.pack,
        signature=signature,
        batch_size=config.caching.text_encoder_batch_size,
        accelerator=accelerator,
    )


def captions_of(config: RunConfig, discovery: Discovery) -> set[str]:
    """Every caption that training and validation can ask a store of text features for; the empty one always."""
    captions = {""}
    for sample in discovery.samples:
        subset = config.datasets[sample.dataset].subsets[sample.subset]
        captions.update(caption_versions(sample.captions, subset, config.caching.caption_variants))
    calm = [dataset.without_augmentation() for dataset in config.datasets]
    for sample in discovery.validation:  # visited as its first visit, always
        captions.update(caption_versions(sample.captions, calm[sample.dataset].subsets[sample.subset], 1))
    return captions


def own_micro_batches(
    plan: BatchPlan, first_step: int, max_steps: int, *, rank: int, accumulation: int, together: bool
) -> Iterator[MicroBatch]:
    """This process's micro-batches from ``first_step`` on.

    Where the processes work ``together``, those with fewer in a step do some of the step's other ones along.
    """
    for step in range(first_step, max_steps):
        micro_batches = plan.step(step)
        own = micro_batches[rank * accumulation : (rank + 1) * accumulation]
        yield from padded(own, micro_batches, min(accumulation, len(micro_batches))) if together else own


def loader(
    config: RunConfig, reader: BatchReader, micro_batches: Iterable[MicroBatch], accelerator: Accelerator
) -> Generator[Batch, None, None]:
    """Batches made ahead of the step by other threads or processes."""
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
    limit = config.validation.max_validation_steps or plan.steps_per_epoch
    micro_batches = [plan.step(step)[0] for step in range(min(plan.steps_per_epoch, limit))]
    measuring = dataclasses.replace(
        reader, samples=samples, placements=data.validation_placements, datasets=datasets, seed=seed
    )
    return Validation(measuring, micro_batches, seed)
