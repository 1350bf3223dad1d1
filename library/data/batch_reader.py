"""One planned micro-batch -> its batch: from the caches, or from pictures and captions.

What a batch holds depends on its description alone, never on who made it or what was read before.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.buckets import Placement, vary
from library.data.cache_keys import LATENTS, MASK, latent_key, mask_key, text_key
from library.data.captions import caption_for_visit
from library.data.control_pictures import load_control
from library.data.images import ColourShift, PixelSettings, colour_shift, load_pixels
from library.data.mask_files import MaskFile
from library.data.masks import load_mask
from library.data.plan import MicroBatch, Visit
from library.io.places import read_bytes
from library.randomness import Draws, python_random
from library.records import Batch, LatentFormat, Resolution, Sample, TensorRecord, stack_rows

if TYPE_CHECKING:
    from library.data.store import TensorStore
    from library.families.protocols import TextEncodingStrategy


@dataclass(frozen=True, kw_only=True)
class BatchReader:
    """Makes the batch of a planned micro-batch. It pickles into worker processes, and threads may share it.

    Attributes:
        samples: What the plan's indices mean.
        placements: One per sample.
        datasets: Settings of the samples' datasets.
        seed: Of the run.
        latent_format: Shape of the noise.
        text_strategy: Makes tokens of captions, or batches of cached text features.
        latents: The cached latents, or None: then pictures are read.
        latents_signature: What the latents depend on besides the picture.
        masks: The cached masks; needed where latents are cached and a sample has a mask.
        texts: The cached text features, or None: then captions become tokens.
        text_signature: What the text features depend on besides the caption.
        caption_variants: How many versions of each caption are cached, where captions change from visit to visit.
        max_steps: Optimizer steps of the run.
        prior_loss_weight: Weight of regularisation pictures.
    """

    samples: Sequence[Sample]
    placements: Sequence[Placement]
    datasets: Sequence[DatasetConfig]
    seed: int
    latent_format: LatentFormat
    text_strategy: "TextEncodingStrategy"
    latents: "TensorStore | None" = None
    latents_signature: Mapping[str, str] | None = None
    masks: "TensorStore | None" = None
    texts: "TensorStore | None" = None
    text_signature: Mapping[str, str] | None = None
    caption_variants: int | None = None
    max_steps: int = 0
    prior_loss_weight: float = 1.0

    def __call__(self, micro_batch: MicroBatch) -> Batch:
        """This reads everything that the micro-batch needs, on the CPU.

        Raises:
            ConfigError: Something of a sample can't be read; it names the sample.
        """
        rows = [self._row(visit) for visit in micro_batch.visits]
        samples, subsets = [row.sample for row in rows], [row.subset for row in rows]
        draws = Draws(
            self.seed, tuple(sample.key for sample in samples), tuple(visit.visit for visit in micro_batch.visits)
        )
        captions, dropped = zip(*(self._caption(micro_batch, row) for row in rows))
        if self.latents is None:
            latents, (pixels, masks) = None, self._decoded(rows)
        else:
            latents, pixels, masks = self._cached_latents(rows, micro_batch.bucket), None, self._cached_masks(rows)
        text, tokens = self._conditioning(samples, captions)
        size = self.latent_format.latent_size(micro_batch.bucket)
        return Batch(
            keys=draws.keys,
            visits=draws.visits,
            captions=captions,
            dropped=torch.tensor(dropped),
            loss_weight=torch.tensor([self._loss_weight(row) for row in rows], dtype=torch.float32),
            resolution=micro_batch.bucket,
            noise=draws.normal("noise", (self.latent_format.channels, *size)),
            latents=latents,
            pixels=pixels,
            text=text,
            tokens=tokens,
            mask=_mask_weights(masks, subsets, size),
            taught=_marked(subset.is_regularisation_data for subset in subsets),
            prior=_marked(sample.is_reg for sample in samples),
            control=self._control(rows),
        )

    def _row(self, visit: Visit) -> "_Row":
        sample = self.samples[visit.sample]
        dataset = self.datasets[sample.dataset]
        subset = dataset.subsets[sample.subset]
        placement, flipped, colour = self.placements[visit.sample], False, None
        if subset.flip_aug:
            flipped = self._random("flip", sample, visit).random() < 0.5
        if subset.varies_pixels:
            placement = vary(placement, sample.size, dataset, subset, sample.focus, self._random("crop", sample, visit))
        if subset.color_aug:
            colour = colour_shift(self._random("colour", sample, visit))
        return _Row(visit.visit, sample, subset, placement, flipped, colour, MaskFile.of(sample, subset))

    def _random(self, purpose: str, sample: Sample, visit: Visit) -> random.Random:
        return python_random(self.seed, purpose, sample.key, visit.visit)

    def _loss_weight(self, row: "_Row") -> float:
        if row.sample.is_reg:
            return self.prior_loss_weight
        return row.subset.regularisation_weight if row.subset.is_regularisation_data else 1.0

    def _caption(self, micro_batch: MicroBatch, row: "_Row") -> tuple[str, bool]:
        return caption_for_visit(
            row.sample.captions,
            row.subset,
            python_random(self.seed, "caption", row.sample.key, row.visit),
            epoch=micro_batch.epoch,
            step=micro_batch.step,
            max_steps=self.max_steps,
            variants=self.caption_variants,
            visit=row.visit,
        )

    def _cached_latents(self, rows: Sequence["_Row"], bucket: Resolution) -> Tensor:
        """Latents (B, C, h, w), as they were stored."""
        assert self.latents is not None and self.latents_signature is not None
        wanted = []
        for row in rows:
            settings = PixelSettings.of(row.subset)
            key = latent_key(row.sample.content, row.placement, row.flipped, settings, self.latents_signature)
            wanted.append((key, f"latents of {row.title} ({row.sample.path})"))
        found = [entry[LATENTS] for entry in _entries(self.latents, wanted)]
        expected = (self.latent_format.channels, *self.latent_format.latent_size(bucket))
        for row, latents in zip(rows, found):
            if tuple(latents.shape) != expected:
                raise ValueError(f"cached latents of {row.title} are {tuple(latents.shape)}, expected {expected}")
        return stack_rows(found)

    def _cached_masks(self, rows: Sequence["_Row"]) -> list[Tensor | None]:
        """The rows' masks (1, h, w), uint8."""
        masked = [(number, row, row.mask) for number, row in enumerate(rows) if row.mask is not None]
        masks: list[Tensor | None] = [None] * len(rows)
        if masked:
            assert self.masks is not None
            stride = self.latent_format.stride
            wanted = [
                (
                    mask_key(mask.content, row.placement, row.flipped, alpha=mask.alpha, stride=stride),
                    f"mask of {row.title} ({mask.path})",
                )
                for _, row, mask in masked
            ]
            for (number, _, _), entry in zip(masked, _entries(self.masks, wanted)):
                masks[number] = entry[MASK]
        return masks

    def _decoded(self, rows: Sequence["_Row"]) -> tuple[Tensor, list[Tensor | None]]:
        """Pictures (B, 3, H, W) and the rows' masks, from their files."""
        pictures: list[Tensor] = []
        masks: list[Tensor | None] = []
        for row in rows:
            what, path, mask = "picture", row.sample.path, row.mask
            try:
                data = read_bytes(path)
                settings = PixelSettings.of(row.subset)
                pictures.append(load_pixels(data, row.placement, row.flipped, settings, row.colour))
                if mask is None:
                    masks.append(None)
                    continue
                what, path = "mask", mask.path
                data = data if mask.alpha else read_bytes(path)
                stride = self.latent_format.stride
                masks.append(load_mask(data, row.placement, row.flipped, stride=stride, alpha=mask.alpha))
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(f"{path}: the {what} of {row.title} can't be read: {reason}") from error
        return torch.stack(pictures), masks

    def _control(self, rows: Sequence["_Row"]) -> Tensor | None:
        """The rows' control pictures (B, 3, H, W), from their files; None: they have none."""
        pictures: list[Tensor] = []
        for row in rows:
            path = row.sample.control
            if path is None:
                continue
            try:
                data = read_bytes(path)
                pictures.append(load_control(data, row.placement, row.flipped, PixelSettings.of(row.subset)))
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(f"{path}: the control picture of {row.title} can't be read: {reason}") from error
        return torch.stack(pictures) if pictures else None

    def _conditioning(
        self, samples: Sequence[Sample], captions: Sequence[str]
    ) -> tuple[TensorRecord | None, TensorRecord | None]:
        """Text features and tokens, of which one is None."""
        if self.texts is None:
            return None, self.text_strategy.tokenize(captions)
        assert self.text_signature is not None
        wanted = [
            (text_key(caption, self.text_signature), f"text of sample {sample.key} ({caption!r})")
            for sample, caption in zip(samples, captions)
        ]
        return self.text_strategy.unpack(_entries(self.texts, wanted)), None


class _Row(NamedTuple):
    """What one visit uses of a sample."""

    visit: int
    sample: Sample
    subset: SubsetConfig
    placement: Placement
    flipped: bool
    colour: ColourShift | None
    mask: MaskFile | None

    @property
    def title(self) -> str:
        return f"sample {self.sample.key}"


def _entries(store: "TensorStore", wanted: Sequence[tuple[str, str]]) -> list[dict[str, Tensor]]:
    """Entries of a store, each given by its key and what people call it."""
    try:
        return store.read_rows([key for key, _ in wanted])
    except KeyError:
        missing = set(store.missing(key for key, _ in wanted))
        what = next((what for key, what in wanted if key in missing), wanted[0][1])
        raise ConfigError(f"the cache has no {what}; start again, so that it is filled") from None
    except OSError as error:
        raise ConfigError(f"the cache can't be read: {error}") from error


def _marked(rows: Iterable[bool]) -> Tensor | None:
    """The marks of the rows (B,), bool; None when no row has one."""
    marks = torch.tensor(list(rows))
    return marks if marks.any() else None


def _mask_weights(
    masks: Sequence[Tensor | None], subsets: Sequence[SubsetConfig], size: tuple[int, int]
) -> Tensor | None:
    """The weights of the loss (B, 1, h, w), 1 where a row has no mask; None where none has one."""
    if all(mask is None for mask in masks):
        return None
    weights = torch.ones(len(masks), 1, *size)
    levels = torch.arange(256, dtype=torch.float64) / 255
    for row, mask, subset in zip(weights, masks, subsets):
        if mask is not None:
            # in fp64, so that white is exactly 1 after rounding, and black exactly the weight
            row.copy_((subset.unmasked_weight + (1 - subset.unmasked_weight) * levels).float()[mask.long()])
    return weights
