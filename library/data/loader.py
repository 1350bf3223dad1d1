"""Planned micro-batches -> batches, in worker processes ahead of the training.

What a batch holds depends on its description alone, never on which worker made it or what was read before.
"""

import itertools
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.buckets import Placement
from library.data.cache_keys import LATENTS, latent_key, text_key
from library.data.captions import caption_for_visit
from library.data.images import load_pixels
from library.data.plan import MicroBatch, Visit
from library.randomness import Draws, python_random
from library.records import Batch, LatentFormat, Resolution, Sample, TensorRecord

if TYPE_CHECKING:
    from library.data.store import TensorStore
    from library.families.protocols import TextEncodingStrategy


@dataclass(frozen=True, kw_only=True)
class BatchReader:
    """Makes the batch of a planned micro-batch. Pickles into worker processes.

    Attributes:
        samples: What the plan's indices mean.
        placements: One per sample.
        contents: File path -> content hash; needed where latents are cached.
        datasets: Settings of the samples' datasets.
        seed: Of the run.
        latent_format: Shape of the noise.
        latents: The cached latents, or None: then pictures are read.
        latents_signature: What the latents depend on besides the picture.
        texts: The cached text features, or None: then captions become tokens.
        text_signature: What the text features depend on besides the caption.
        text_record: The family's record of text features; needed where they are cached.
        text_strategy: Makes the tokens; needed where text features are not cached.
        max_steps: Optimizer steps of the run.
        prior_loss_weight: Weight of regularisation pictures.
    """

    samples: Sequence[Sample]
    placements: Sequence[Placement]
    contents: Mapping[str, str]
    datasets: Sequence[DatasetConfig]
    seed: int
    latent_format: LatentFormat
    latents: "TensorStore | None" = None
    latents_signature: Mapping[str, str] | None = None
    texts: "TensorStore | None" = None
    text_signature: Mapping[str, str] | None = None
    text_record: type[TensorRecord] | None = None
    text_strategy: "TextEncodingStrategy | None" = None
    max_steps: int = 0
    prior_loss_weight: float = 1.0

    def __call__(self, micro_batch: MicroBatch) -> Batch:
        """This reads everything that the micro-batch needs, on the CPU.

        Raises:
            ConfigError: Something of a sample can't be read; it names the sample.
        """
        samples = [self.samples[visit.sample] for visit in micro_batch.visits]
        visits = tuple(visit.visit for visit in micro_batch.visits)
        draws = Draws(self.seed, tuple(sample.key for sample in samples), visits)
        captions = [self._caption(micro_batch, visit) for visit in micro_batch.visits]
        pictures = torch.stack([self._picture(visit, micro_batch.bucket) for visit in micro_batch.visits])
        text, tokens = self._conditioning(samples, [caption for caption, _ in captions])
        shape = (self.latent_format.channels, *self.latent_format.latent_size(micro_batch.bucket))
        return Batch(
            keys=draws.keys,
            visits=visits,
            captions=tuple(caption for caption, _ in captions),
            dropped=torch.tensor([dropped for _, dropped in captions]),
            loss_weight=torch.tensor([self.prior_loss_weight if sample.is_reg else 1.0 for sample in samples]),
            resolution=micro_batch.bucket,
            noise=draws.normal("noise", shape),
            latents=None if self.latents is None else pictures,
            pixels=pictures if self.latents is None else None,
            text=text,
            tokens=tokens,
        )

    def _subset(self, sample: Sample) -> SubsetConfig:
        return self.datasets[sample.dataset].subsets[sample.subset]

    def _caption(self, micro_batch: MicroBatch, visit: Visit) -> tuple[str, bool]:
        sample = self.samples[visit.sample]
        return caption_for_visit(
            sample.captions,
            self._subset(sample),
            python_random(self.seed, "caption", sample.key, visit.visit),
            epoch=micro_batch.epoch,
            step=micro_batch.step,
            max_steps=self.max_steps,
        )

    def _flipped(self, visit: Visit) -> bool:
        sample = self.samples[visit.sample]
        if not self._subset(sample).flip_aug:
            return False
        return python_random(self.seed, "flip", sample.key, visit.visit).random() < 0.5

    def _picture(self, visit: Visit, bucket: Resolution) -> Tensor:
        """The sample's cached latents (C, h, w), or its pixels (3, H, W)."""
        sample, placement, flipped = self.samples[visit.sample], self.placements[visit.sample], self._flipped(visit)
        if self.latents is None:
            try:
                return load_pixels(sample.path, placement, flipped)
            except OSError as error:
                raise ConfigError(
                    f"{sample.path}: the picture of sample {sample.key} can't be read: {error}"
                ) from error
        assert self.latents_signature is not None
        key = latent_key(self.contents[sample.path], placement, flipped, self.latents_signature)
        latents = _read(self.latents, key, f"latents of sample {sample.key} ({sample.path})")[LATENTS]
        expected = (self.latent_format.channels, *self.latent_format.latent_size(bucket))
        if tuple(latents.shape) != expected:
            raise ValueError(f"cached latents of sample {sample.key} are {tuple(latents.shape)}, expected {expected}")
        return latents

    def _conditioning(
        self, samples: Sequence[Sample], captions: Sequence[str]
    ) -> tuple[TensorRecord | None, TensorRecord | None]:
        """Text features and tokens, of which one is None."""
        if self.texts is None:
            assert self.text_strategy is not None
            return None, self.text_strategy.tokenize(captions)
        assert self.text_record is not None and self.text_signature is not None
        rows = [
            _read(self.texts, text_key(caption, self.text_signature), f"text of sample {sample.key} ({caption!r})")
            for sample, caption in zip(samples, captions)
        ]
        return self.text_record.stack(rows), None


def make_loader(
    reader: BatchReader,
    micro_batches: Iterable[MicroBatch],
    *,
    workers: int = 0,
    persistent: bool = True,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Iterator[Batch]:
    """This reads batches ahead, in the order of the micro-batches. The batches are the same at any worker count.

    Args:
        reader: Makes one batch.
        micro_batches: What to read; taken lazily.
        workers: Processes that read; 0 reads in this one, when a batch is asked for.
        persistent: Whether workers live on from epoch to epoch.
        pin_memory: Whether batches lie in page-locked memory.
        start_method: How workers start (``fork``, ``spawn``, ``forkserver``); by default as the platform does it.

    Raises:
        ConfigError: Something of a sample can't be read.
    """
    epochs: Iterable[Iterable[MicroBatch]] = [micro_batches]
    if not persistent and workers:
        epochs = (group for _, group in itertools.groupby(micro_batches, key=lambda micro_batch: micro_batch.epoch))
    for part in epochs:
        loader = DataLoader(
            _Readable(reader),
            batch_size=None,
            sampler=part,
            num_workers=workers,
            pin_memory=pin_memory,
            multiprocessing_context=start_method if workers else None,
            worker_init_fn=_start_worker,
        )
        for item in loader:
            if isinstance(item, _Failure):
                raise ConfigError(item.message)
            yield item


@dataclass(frozen=True)
class _Failure:
    """What a worker says instead of a batch, so that the message arrives without the worker's traceback."""

    message: str


@dataclass(frozen=True)
class _Readable(Dataset["Batch | _Failure"]):
    reader: BatchReader

    def __getitem__(self, micro_batch: MicroBatch) -> "Batch | _Failure":
        try:
            return self.reader(micro_batch)
        except ConfigError as error:
            return _Failure(str(error))
        except Exception as error:
            keys = ", ".join(self.reader.samples[visit.sample].key for visit in micro_batch.visits)
            raise RuntimeError(
                f"step {micro_batch.step}: no batch of the samples {keys}: {type(error).__name__}: {error}"
            ) from error


def _start_worker(_: int) -> None:
    # A signal to the whole process group (Ctrl-C, a cluster's warning) is for the training process, which finishes its
    # step and saves; a worker that died of it would end the run before. SIGTERM stays as torch has set it: that is how
    # the training process ends its workers.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism; and tokenizers warn after a fork


def _read(store: "TensorStore", key: str, what: str) -> dict[str, Tensor]:
    try:
        return store.read(key)
    except KeyError:
        raise ConfigError(f"the cache has no {what}; start again, so that it is filled") from None
    except OSError as error:
        raise ConfigError(f"the cache can't be read at {what}: {error}") from error
