"""Which samples each optimizer step uses: a pure function of the samples, the seed and the step.

Nothing is remembered between steps, so resuming is recomputing, and nothing depends on processes or workers: W
processes that accumulate A micro-batches take the same steps as one that accumulates W * A.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.buckets import Placement
from library.data.curriculum import ALWAYS, Share, Timetable, Window
from library.data.spread import spread
from library.randomness import python_random
from library.records import Resolution, Sample


class Visit(NamedTuple):
    """One use of a sample.

    Attributes:
        sample: Index of the sample.
        visit: Which use of the sample it is; no two in a run have the same number.
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


class _Group(NamedTuple):
    """The samples of a dataset that have one size."""

    dataset: int
    bucket: Resolution
    samples: "array[int]"


class _Part(NamedTuple):
    """The samples of a subset, how many visits they have in each group, and when they are used."""

    name: tuple[int, int]
    samples: "array[int]"
    visits: Counter[int]
    window: Window
    share: Share | None


class _Epoch(NamedTuple):
    """The micro-batches of an epoch, their samples one after another. Numbers alone, since an epoch may be long."""

    samples: "array[int]"
    visits: "array[int]"
    starts: "array[int]"
    groups: "array[int]"


class BatchPlan:
    """The micro-batches of every optimizer step of a run.

    In each epoch every sample of the subsets that are active is used exactly ``num_repeats`` times; of a subset with a
    ``probability`` below 1, so large a share of those visits is made, each equally often in the long run. A micro-batch
    has its dataset's batch size; one of each bucket may be short. A picture is in one micro-batch twice only where the
    bucket has too few others.

    Attributes:
        varies: Whether epochs differ in what they use, and so in length.
        samples_per_epoch: Visits of the first epoch, were it not cut short by a subset that begins or ends.
        micro_batches_per_epoch: Micro-batches of that epoch, over all processes.
        steps_per_epoch: Optimizer steps of that epoch.
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
            datasets: For their batch sizes, and when their subsets are used.
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
        groups: dict[tuple[int, Resolution], array[int]] = defaultdict(lambda: array("L"))
        parts: dict[tuple[int, int], array[int]] = defaultdict(lambda: array("L"))
        for index, (sample, placement) in enumerate(zip(samples, placements)):
            groups[sample.dataset, placement.bucket].append(index)
            parts[sample.dataset, sample.subset].append(index)
        self._groups = [_Group(*key, members) for key, members in sorted(groups.items())]
        self._group_of = array("L", bytes(len(samples) * array("L").itemsize))
        for number, group in enumerate(self._groups):
            for index in group.samples:
                self._group_of[index] = number
        self._parts = [
            self._part(name, members, datasets[name[0]].subsets[name[1]]) for name, members in sorted(parts.items())
        ]
        self.varies = any(part.window != ALWAYS or part.share is not None for part in self._parts)
        self._timetable = Timetable([part.window for part in self._parts], self._steps)
        counts = self._visits_by_group(0, self._active(0))
        self.samples_per_epoch = sum(counts.values())
        self.micro_batches_per_epoch = self._micro_batches(counts)
        self.steps_per_epoch = max(1, -(-self.micro_batches_per_epoch // micro_batches_per_step))
        # two epochs, since the loader reads ahead into the next one
        self._recent: OrderedDict[int, _Epoch] = OrderedDict()

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to; both are counted from 0."""
        if step < 0:
            raise ValueError(f"steps are counted from 0, not {step}")
        return self._timetable.epoch_of(step) if self.varies else step // self.steps_per_epoch

    def first_step(self, epoch: int) -> int:
        """The step with which an epoch begins, both counted from 0: the steps of so many epochs."""
        if epoch < 0:
            raise ValueError(f"epochs are counted from 0, not {epoch}")
        return self._timetable.first_step(epoch) if self.varies else epoch * self.steps_per_epoch

    def step(self, step: int) -> tuple[MicroBatch, ...]:
        """The micro-batches of an optimizer step, counted from 0.

        Rank r with accumulation A takes ``[r * A : (r + 1) * A]`` of them.

        Raises:
            ValueError: No subset is active in it; ``problem`` tells beforehand.
        """
        epoch = self.epoch_of(step)
        planned = self._epoch(epoch)
        first = (step - self.first_step(epoch)) * self._per_step
        end = min(first + self._per_step, len(planned.groups))
        if first >= end:
            raise ValueError(f"no subset is used in step {step}")
        bounds = planned.starts[first : end + 1]
        micro_batches = []
        for number, begin, stop in zip(planned.groups[first:end], bounds, bounds[1:]):
            visits = tuple(map(Visit, planned.samples[begin:stop], planned.visits[begin:stop]))
            group = self._groups[number]
            micro_batches.append(MicroBatch(step, epoch, group.dataset, group.bucket, visits, bounds[-1] - bounds[0]))
        return tuple(micro_batches)

    def problem(self, max_steps: int) -> str | None:
        """Says in which of the first ``max_steps`` steps no subset is active, and what to do; None: in none."""
        return self._timetable.gap(max_steps) if self.varies else None

    def fingerprint(self) -> str:
        """A hash of all that the plan depends on: equal plans have equal steps."""
        samples = self._samples
        uses = [(part.name, part.window, part.share and part.share.count) for part in self._parts]
        digest = hashlib.blake2b(repr((self._seed, self._per_step, self._batch_sizes, uses)).encode(), digest_size=16)
        for group in self._groups:
            members = [(samples[i].key, samples[i].subset, samples[i].num_repeats) for i in group.samples]
            digest.update(repr((group.dataset, tuple(group.bucket), members)).encode())
        return digest.hexdigest()

    def _part(self, name: tuple[int, int], members: "array[int]", subset: SubsetConfig) -> _Part:
        visits: Counter[int] = Counter()
        for index in members:
            visits[self._group_of[index]] += self._samples[index].num_repeats
        count = max(1, round(subset.probability * visits.total()))
        seed = (self._seed, "probability", *name)
        share = Share(self._repeats(members), count, seed) if count < visits.total() else None
        return _Part(name, members, visits, Window.of(subset), share)

    def _repeats(self, members: Iterable[int]) -> dict[int, int]:
        return {index: self._samples[index].num_repeats for index in members}

    def _active(self, epoch: int) -> Sequence[int]:
        return self._timetable.active(epoch) if self.varies else range(len(self._parts))

    def _steps(self, epoch: int, active: Sequence[int]) -> int:
        """Optimizer steps of an epoch that uses these parts once."""
        return -(-self._micro_batches(self._visits_by_group(epoch, active)) // self._per_step)

    def _visits_by_group(self, epoch: int, active: Sequence[int]) -> Counter[int]:
        counts: Counter[int] = Counter()
        for number in active:
            part = self._parts[number]
            if part.share is None:
                counts.update(part.visits)
            else:
                visits = part.share.visits(self._timetable.turn(epoch, number))
                counts.update(map(self._group_of.__getitem__, visits))
        return counts

    def _micro_batches(self, visits_by_group: Counter[int]) -> int:
        return sum(
            -(-count // self._batch_sizes[self._groups[number].dataset]) for number, count in visits_by_group.items()
        )

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._recent:
            self._recent[epoch] = self._plan_epoch(epoch)
            while len(self._recent) > 2:
                self._recent.popitem(last=False)
        self._recent.move_to_end(epoch)
        return self._recent[epoch]

    def _plan_epoch(self, epoch: int) -> _Epoch:
        repeats, next_visit = self._uses(epoch)
        batches: list[tuple[int, list[int]]] = []
        for number, group in enumerate(self._groups):
            rng = python_random(self._seed, "micro-batches", epoch, group.dataset, str(group.bucket))
            here = {index: repeats[index] for index in group.samples if index in repeats}
            batches += [(number, batch) for batch in spread(here, self._batch_sizes[group.dataset], rng)]
        draw = python_random(self._seed, "order of micro-batches", epoch).random
        batches.sort(key=lambda _: draw())
        planned = _Epoch(array("L"), array("Q"), array("L", [0]), array("L"))
        for number, batch in batches:
            planned.groups.append(number)
            planned.samples.extend(batch)
            planned.starts.append(len(planned.samples))
        for index in planned.samples:
            planned.visits.append(next_visit[index])
            next_visit[index] += 1
        return planned

    def _uses(self, epoch: int) -> tuple[dict[int, int], dict[int, int]]:
        """Which samples an epoch uses how often, and the number of each one's first visit in it."""
        repeats: dict[int, int] = {}
        first_visit: dict[int, int] = {}
        for number in self._active(epoch):
            part = self._parts[number]
            if part.share is None:
                own = self._repeats(part.samples)
                repeats |= own
                first_visit |= {index: epoch * count for index, count in own.items()}
            else:
                turn = self._timetable.turn(epoch, number)
                repeats |= Counter(part.share.visits(turn))
                first_visit |= part.share.earlier_uses(turn)
        return repeats, first_visit
