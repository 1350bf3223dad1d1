"""Which samples each optimizer step uses: a pure function of the samples, the seed and the step.

Nothing is remembered between steps, so resuming is recomputing, and nothing depends on processes or workers: W
processes that accumulate A micro-batches take the same steps as one that accumulates W * A.
"""

import hashlib
import random
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from library.config.dataset import DatasetConfig
from library.data.buckets import Placement
from library.randomness import python_random
from library.records import Resolution, Sample


class Visit(NamedTuple):
    """One use of a sample.

    Attributes:
        sample: Index of the sample.
        visit: How often it had been used before, in the whole run.
    """

    sample: int
    visit: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one dataset and one size that go through the model together.

    Attributes:
        step: The optimizer step that it belongs to, counted from 0.
        epoch: Counted from 0.
        dataset: Index of the dataset.
        bucket: The size of its pictures.
        visits: Its samples, in order.
        step_samples: Samples of the whole optimizer step, over all processes and micro-batches.
    """

    step: int
    epoch: int
    dataset: int
    bucket: Resolution
    visits: tuple[Visit, ...]
    step_samples: int


_Planned = tuple[int, Resolution, tuple[Visit, ...]]
"""Dataset, bucket and visits of a micro-batch before it is given to a step."""


class BatchPlan:
    """The micro-batches of every optimizer step of a run.

    In each epoch every sample is used exactly ``num_repeats`` times. A micro-batch has its dataset's batch size; one of
    each bucket may be short. A picture is in one micro-batch twice only where the bucket has too few others.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        placements: Sequence[Placement],
        datasets: Sequence[DatasetConfig],
        seed: int,
        micro_batches_per_step: int,
    ):
        """This groups the samples by dataset and bucket.

        Args:
            samples: What to train on.
            placements: One per sample.
            datasets: For their batch sizes.
            seed: Of the run.
            micro_batches_per_step: World size times accumulation. An epoch's last step may have fewer.
        """
        if not samples:
            raise ValueError("there are no samples to plan for")
        if len(samples) != len(placements):
            raise ValueError(f"{len(samples)} samples have {len(placements)} placements")
        if micro_batches_per_step < 1:
            raise ValueError(f"a step has at least 1 micro-batch, not {micro_batches_per_step}")
        self._samples, self._seed, self._per_step = samples, seed, micro_batches_per_step
        self._batch_sizes = [dataset.batch_size for dataset in datasets]
        groups: dict[tuple[int, Resolution], list[int]] = defaultdict(list)
        for index, (sample, placement) in enumerate(zip(samples, placements)):
            groups[sample.dataset, placement.bucket].append(index)
        self._groups = dict(sorted(groups.items()))
        visits = [sum(samples[index].num_repeats for index in members) for members in self._groups.values()]
        sizes = [self._batch_sizes[dataset] for dataset, _ in self._groups]
        self.samples_per_epoch = sum(visits)
        """Visits of an epoch."""
        self.micro_batches_per_epoch = sum(-(-count // size) for count, size in zip(visits, sizes))
        """Micro-batches of an epoch, over all processes."""
        self.steps_per_epoch = -(-self.micro_batches_per_epoch // micro_batches_per_step)
        """Optimizer steps of an epoch."""
        # two epochs, since the loader reads ahead into the next one
        self._recent: OrderedDict[int, tuple[_Planned, ...]] = OrderedDict()

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to; both are counted from 0."""
        if step < 0:
            raise ValueError(f"steps are counted from 0, not {step}")
        return step // self.steps_per_epoch

    def step(self, step: int) -> tuple[MicroBatch, ...]:
        """The micro-batches of an optimizer step, counted from 0.

        Rank r with accumulation A takes ``[r * A : (r + 1) * A]`` of them.
        """
        epoch = self.epoch_of(step)
        first = step % self.steps_per_epoch * self._per_step
        planned = self._epoch(epoch)[first : first + self._per_step]
        step_samples = sum(len(visits) for _, _, visits in planned)
        return tuple(
            MicroBatch(step, epoch, dataset, bucket, visits, step_samples) for dataset, bucket, visits in planned
        )

    def fingerprint(self) -> str:
        """A hash of all that the plan depends on: equal plans have equal steps."""
        digest = hashlib.blake2b(repr((self._seed, self._per_step, self._batch_sizes)).encode(), digest_size=16)
        for (dataset, bucket), members in self._groups.items():
            digest.update(repr((dataset, tuple(bucket))).encode())
            for index in members:
                digest.update(repr((self._samples[index].key, self._samples[index].num_repeats)).encode())
        return digest.hexdigest()

    def _epoch(self, epoch: int) -> tuple[_Planned, ...]:
        if epoch not in self._recent:
            self._recent[epoch] = self._plan_epoch(epoch)
            while len(self._recent) > 2:
                self._recent.popitem(last=False)
        self._recent.move_to_end(epoch)
        return self._recent[epoch]

    def _plan_epoch(self, epoch: int) -> tuple[_Planned, ...]:
        batches = []
        for (dataset, bucket), members in self._groups.items():
            rng = python_random(self._seed, "micro-batches", epoch, dataset, str(bucket))
            repeats = {index: self._samples[index].num_repeats for index in members}
            batches += [(dataset, bucket, batch) for batch in spread(repeats, self._batch_sizes[dataset], rng)]
        python_random(self._seed, "order of micro-batches", epoch).shuffle(batches)
        used: defaultdict[int, int] = defaultdict(int)
        planned = []
        for dataset, bucket, batch in batches:
            visits = []
            for index in batch:
                visits.append(Visit(index, epoch * self._samples[index].num_repeats + used[index]))
                used[index] += 1
            planned.append((dataset, bucket, tuple(visits)))
        return tuple(planned)


def spread(repeats: Mapping[int, int], batch_size: int, rng: random.Random) -> list[list[int]]:
    """This deals items into batches at random, each item into as many different batches as it has repeats.

    An item is twice in a batch only where nothing else is possible: the item always goes into the batches with the most
    free places, which finds a way whenever there is one (Gale 1957 and Ryser 1957, on matrices of zeros and ones).

    Args:
        repeats: Item -> how often it occurs.
        batch_size: Items per batch; one batch has what is left over.
        rng: Decides between equals.
    """
    count = sum(repeats.values())
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    batches: list[list[int]] = [[] for _ in sizes]
    by_free_places: list[list[int]] = [[] for _ in range(batch_size + 1)]  # each in random order
    for number, size in enumerate(sizes):
        _insert(by_free_places[size], number, rng)
    most = batch_size
    items = list(repeats)
    rng.shuffle(items)
    for item in items:
        left = repeats[item]
        while left:
            chosen: list[tuple[int, int]] = []
            for places in range(most, 0, -1):
                level = by_free_places[places]
                while level and len(chosen) < left:
                    chosen.append((level.pop(), places))
                if len(chosen) == left:
                    break
            for number, places in chosen:
                batches[number].append(item)
                _insert(by_free_places[places - 1], number, rng)
            left -= len(chosen)
            while most and not by_free_places[most]:
                most -= 1
    return batches


def _insert(numbers: list[int], number: int, rng: random.Random) -> None:
    """Puts the number at a random place; what was there goes to the end."""
    place = int(rng.random() * (len(numbers) + 1))
    numbers.append(number)
    numbers[place], numbers[-1] = numbers[-1], numbers[place]
