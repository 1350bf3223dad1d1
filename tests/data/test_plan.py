import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.dataset import DatasetConfig
from library.data.buckets import Placement
from library.data.plan import BatchPlan, spread
from library.randomness import python_random
from library.records import Box, Resolution, Sample

SQUARE, WIDE = Resolution(64, 64), Resolution(128, 64)


def make_plan(repeats, *, batch_sizes=(2,), seed=0, per_step=1, buckets=None, dataset_of=None):
    samples, placements = [], []
    for number, count in enumerate(repeats):
        dataset = dataset_of(number) if dataset_of else 0
        bucket = buckets(number) if buckets else SQUARE
        samples.append(Sample(f"{dataset}/0/{number}", f"{number}.png", ("",), bucket, dataset, 0, num_repeats=count))
        placements.append(Placement(bucket, bucket, Box(0, 0, *bucket)))
    datasets = [DatasetConfig(resolution=SQUARE, batch_size=size, subsets=()) for size in batch_sizes]
    return BatchPlan(samples, placements, datasets, seed=seed, micro_batches_per_step=per_step)


def epoch_of_plan(plan, epoch):
    first = epoch * plan.steps_per_epoch
    return [batch for step in range(first, first + plan.steps_per_epoch) for batch in plan.step(step)]


repeats_lists = st.lists(st.integers(1, 6), min_size=1, max_size=25)


@given(
    repeats=repeats_lists,
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**40),
    per_step=st.integers(1, 7),
    epoch=st.integers(0, 3),
)
def test_every_sample_is_visited_exactly_as_often_as_asked(repeats, sizes, seed, per_step, epoch):
    plan = make_plan(
        repeats,
        batch_sizes=sizes,
        seed=seed,
        per_step=per_step,
        dataset_of=lambda n: n % 2,
        buckets=lambda n: (SQUARE, WIDE)[n % 3 == 0],
    )
    batches = epoch_of_plan(plan, epoch)
    visits = [visit for batch in batches for visit in batch.visits]
    assert len(visits) == plan.samples_per_epoch and len(batches) == plan.micro_batches_per_epoch
    # each visit number of the whole run occurs exactly once
    assert sorted((visit.sample, visit.visit) for visit in visits) == [
        (sample, epoch * count + repeat) for sample, count in enumerate(repeats) for repeat in range(count)
    ]
    for batch in batches:
        assert batch.epoch == epoch == plan.epoch_of(batch.step)
        assert 1 <= len(batch.visits) <= sizes[batch.dataset]
        assert {visit.sample % 2 for visit in batch.visits} == {batch.dataset}
        assert {(SQUARE, WIDE)[visit.sample % 3 == 0] for visit in batch.visits} == {batch.bucket}
    short = Counter((batch.dataset, batch.bucket) for batch in batches if len(batch.visits) < sizes[batch.dataset])
    assert all(count == 1 for count in short.values())


@given(repeats=repeats_lists, batch_size=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_processes_and_accumulation_share_out_the_same_steps(repeats, batch_size, seed):
    together = make_plan(repeats, batch_sizes=(batch_size,), seed=seed, per_step=6)
    for world, accumulation in ((1, 6), (2, 3), (6, 1)):
        again = make_plan(repeats, batch_sizes=(batch_size,), seed=seed, per_step=world * accumulation)
        for step in range(2 * together.steps_per_epoch):
            whole = together.step(step)
            shares = [again.step(step)[rank * accumulation : (rank + 1) * accumulation] for rank in range(world)]
            assert tuple(batch for share in shares for batch in share) == whole
            assert {batch.step_samples for batch in whole} == {sum(len(batch.visits) for batch in whole)}


@given(repeats=repeats_lists, per_step=st.integers(1, 4), other=st.integers(1, 4))
def test_the_order_of_micro_batches_does_not_depend_on_the_steps(repeats, per_step, other):
    def order(count):
        return [(batch.bucket, batch.visits) for batch in epoch_of_plan(make_plan(repeats, per_step=count), 1)]

    assert order(per_step) == order(other)


def test_resuming_is_recomputing():
    repeats = [1, 2, 3, 4, 5, 6, 7]
    plan = make_plan(repeats, per_step=2)
    steps = [plan.step(step) for step in range(4 * plan.steps_per_epoch)]
    for step in (0, 3, 17, len(steps) - 1, 5, 4):
        assert make_plan(repeats, per_step=2).step(step) == steps[step]
        assert plan.step(step) == steps[step]


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        return [sorted(v.sample for v in b.visits) for b in epoch_of_plan(make_plan([1] * 40, seed=seed), epoch)]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(a != b for a, b in itertools.pairwise(orders))
    assert order(0, 0) == order(0, 0)


def test_visits_count_up_within_an_epoch():
    seen = Counter()
    plan = make_plan([3, 1, 5, 2], batch_sizes=(2,))
    for epoch in range(3):
        for batch in epoch_of_plan(plan, epoch):
            for visit in batch.visits:
                assert visit.visit == seen[visit.sample]
                seen[visit.sample] += 1


def test_datasets_and_buckets_are_mixed():
    plan = make_plan([1] * 40, batch_sizes=(1, 1), dataset_of=lambda n: n // 20)
    order = [batch.dataset for batch in epoch_of_plan(plan, 0)]
    assert sum(a != b for a, b in itertools.pairwise(order)) > 5


@given(
    repeats=st.lists(st.integers(1, 8), min_size=1, max_size=12),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 2**40),
)
def test_no_picture_is_twice_in_a_batch_where_that_can_be_avoided(repeats, batch_size, seed):
    batches = spread(dict(enumerate(repeats)), batch_size, python_random(seed))
    sizes = sorted((len(batch) for batch in batches), reverse=True)
    # Gale and Ryser: it can be avoided when the k most frequent never need more places than min(size, k) per batch
    frequent = sorted(repeats, reverse=True)
    possible = all(sum(frequent[:k]) <= sum(min(size, k) for size in sizes) for k in range(1, len(repeats) + 1))
    distinct = all(len(set(batch)) == len(batch) for batch in batches)
    assert distinct == possible


def test_all_pairs_of_pictures_meet():
    pairs = set()
    for epoch in range(30):
        for batch in epoch_of_plan(make_plan([3] * 8), epoch):
            pairs.add(frozenset(visit.sample for visit in batch.visits))
    assert len(pairs) == 28


def test_repeats_do_not_make_the_same_batches_again():
    batches = spread(dict.fromkeys(range(100), 10), 4, python_random(0))
    assert len(batches) == 250
    assert len({frozenset(batch) for batch in batches}) > 240


def test_the_fingerprint_tells_plans_apart():
    plans = [
        make_plan([1, 2]),
        make_plan([2, 1]),
        make_plan([1, 2], seed=1),
        make_plan([1, 2], batch_sizes=(3,)),
        make_plan([1, 2], per_step=2),
        make_plan([1, 2], buckets=lambda n: WIDE),
        make_plan([1, 2, 1]),
    ]
    assert len({plan.fingerprint() for plan in plans}) == len(plans)
    assert make_plan([1, 2]).fingerprint() == plans[0].fingerprint()


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        make_plan([])
    with pytest.raises(ValueError, match="at least 1 micro-batch"):
        make_plan([1], per_step=0)
    with pytest.raises(ValueError, match="counted from 0"):
        make_plan([1]).step(-1)
    with pytest.raises(ValueError, match="placements"):
        BatchPlan([Sample("a", "a", ("",), SQUARE, 0, 0)], [], [], seed=0, micro_batches_per_step=1)
