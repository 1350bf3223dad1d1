import itertools
import math
import sys
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.buckets import Placement
from library.data.plan import BatchPlan
from library.data.spread import spread
from library.randomness import python_random
from library.records import Box, Resolution, Sample

SQUARE, WIDE = Resolution(64, 64), Resolution(128, 64)


def make_plan(
    repeats, *, batch_sizes=(2,), seed=0, per_step=1, buckets=None, dataset_of=None, subset_of=None, subsets=({},)
):
    """A plan of samples with these repeats; ``subsets`` are the settings of each dataset's subsets."""
    samples, placements = [], []
    for number, count in enumerate(repeats):
        dataset = dataset_of(number) if dataset_of else 0
        subset = subset_of(number) if subset_of else 0
        bucket = buckets(number) if buckets else SQUARE
        key, name = f"{dataset}/{subset}/{number}", f"{number}.png"
        samples.append(Sample(key, name, name, ("",), bucket, dataset, subset, num_repeats=count))
        placements.append(Placement(bucket, bucket, Box(0, 0, *bucket)))
    configured = tuple(SubsetConfig(image_dir=f"{number}", **settings) for number, settings in enumerate(subsets))
    datasets = [DatasetConfig(resolution=SQUARE, batch_size=size, subsets=configured) for size in batch_sizes]
    return BatchPlan(samples, placements, datasets, seed=seed, micro_batches_per_step=per_step)


def epoch_of_plan(plan, epoch):
    return [batch for step in range(plan.first_step(epoch), plan.first_step(epoch + 1)) for batch in plan.step(step)]


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
    assert not plan.varies and plan.first_step(epoch) == epoch * plan.steps_per_epoch
    assert plan.problem(10**9) is None
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


def test_the_order_of_buckets_differs_by_epoch_and_seed():
    def order(seed, epoch):
        plan = make_plan([1] * 12, seed=seed, buckets=lambda n: Resolution(64 * (n + 1), 64))
        return [batch.bucket for batch in epoch_of_plan(plan, epoch)]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(buckets) for buckets in orders}) == 4
    assert len({frozenset(buckets) for buckets in orders}) == 1


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


@pytest.mark.parametrize("repeats", [1, 3])
def test_all_pairs_of_pictures_meet(repeats):
    pairs = set()
    for epoch in range(90 // repeats):
        for batch in epoch_of_plan(make_plan([repeats] * 8), epoch):
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
        make_plan([1, 2], subsets=({}, {}), subset_of=lambda n: n),
        make_plan([1, 2], subsets=({"probability": 0.7},)),
        make_plan([1, 2], subsets=({"start_step": 2},)),
        make_plan([1, 2], subsets=({"start_epoch": 2},)),
        make_plan([1, 2], subsets=({"end_step": 2},)),
        make_plan([1, 2], subsets=({"end_epoch": 2},)),
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
        BatchPlan([Sample("a", "a", "", ("",), SQUARE, 0, 0)], [], [], seed=0, micro_batches_per_step=1)
    with pytest.raises(ValueError, match="epochs are counted from 0"):
        make_plan([1]).first_step(-1)


def test_a_fingerprint_ignores_settings_that_do_nothing():
    plain = make_plan([1, 2]).fingerprint()
    for settings in ({"start_epoch": 1}, {"start_step": 1}, {"probability": 0.99}):
        plan = make_plan([1, 2], subsets=(settings,))
        assert plan.fingerprint() == plain and not plan.varies


@given(
    repeats=repeats_lists,
    probability=st.floats(0.01, 0.99),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    epochs=st.integers(1, 12),
)
def test_a_share_of_the_visits_is_made_evenly(repeats, probability, batch_size, seed, epochs):
    plan = make_plan(
        repeats,
        batch_sizes=(batch_size,),
        seed=seed,
        buckets=lambda n: (SQUARE, WIDE)[n % 3 == 0],
        subsets=({"probability": probability},),
    )
    total = sum(repeats)
    count = max(1, round(probability * total))
    assert plan.samples_per_epoch == count
    uses = Counter()
    for epoch in range(epochs):
        visits = [visit for batch in epoch_of_plan(plan, epoch) for visit in batch.visits]
        assert len(visits) == count
        for visit in visits:  # numbered without a gap, in the order in which they are made
            assert visit.visit == uses[visit.sample]
            uses[visit.sample] += 1
    least, most = epochs * count // total, -(-epochs * count // total)
    assert all(least * own <= uses[sample] <= most * own for sample, own in enumerate(repeats))


def test_the_share_is_another_one_in_each_epoch():
    plan = make_plan([1] * 40, subsets=({"probability": 0.5},))
    used = [{visit.sample for batch in epoch_of_plan(plan, epoch) for visit in batch.visits} for epoch in range(6)]
    assert [len(samples) for samples in used] == [20] * 6
    assert all(used[n] | used[n + 1] == set(range(40)) for n in (0, 2, 4))
    assert used[0] not in (used[2], used[3]) and used[2] not in (used[4], used[5])
    other = make_plan([1] * 40, subsets=({"probability": 0.5},), seed=1)
    assert used[0] != {visit.sample for batch in epoch_of_plan(other, 0) for visit in batch.visits}


def test_a_share_begins_with_its_subset():
    subsets = ({}, {"probability": 0.4, "start_epoch": 3}, {"probability": 0.4, "start_step": 6})
    plan = make_plan([1] * 15, subset_of=lambda n: n % 3, subsets=subsets)
    uses = Counter()
    for epoch in range(14):
        for batch in epoch_of_plan(plan, epoch):
            for sample, visit in batch.visits:
                assert sample % 3 == 0 or visit == uses[sample]
                uses[sample] += 1
        for number in (1, 2):
            own = [uses[sample] for sample in range(15) if sample % 3 == number]
            assert max(own) - min(own) <= 1
    assert all(uses[sample] >= 4 for sample in range(15))


@given(repeats=repeats_lists, probability=st.floats(0.05, 0.95), per_step=st.integers(1, 4))
def test_a_share_does_not_depend_on_the_steps(repeats, probability, per_step):
    def order(count, epoch):
        plan = make_plan(repeats, per_step=count, subsets=({"probability": probability},))
        return [(batch.bucket, batch.visits) for batch in epoch_of_plan(plan, epoch)]

    assert order(1, 2) == order(per_step, 2)


def test_epochs_of_a_share_differ_in_length():
    plan = make_plan(
        [1] * 9, batch_sizes=(4,), buckets=lambda n: (SQUARE, WIDE)[n < 3], subsets=({"probability": 0.5},)
    )
    assert plan.varies and plan.samples_per_epoch == 4
    lengths = [plan.first_step(epoch + 1) - plan.first_step(epoch) for epoch in range(20)]
    assert set(lengths) == {1, 2}
    assert plan.steps_per_epoch == plan.micro_batches_per_epoch == lengths[0]
    for epoch, batches in enumerate(epoch_of_plan(plan, epoch) for epoch in range(20)):
        assert len(batches) == lengths[epoch]
        assert {batch.epoch for batch in batches} == {epoch}


windows = st.fixed_dictionaries(
    {},
    optional={
        "start_step": st.integers(1, 30),
        "end_step": st.integers(1, 30),
        "start_epoch": st.integers(1, 5),
        "end_epoch": st.integers(1, 5),
        "probability": st.sampled_from([0.3, 0.7]),
    },
).filter(
    lambda w: (
        not ("start_step" in w and "start_epoch" in w)
        and not ("end_step" in w and "end_epoch" in w)
        and w.get("start_step", 1) <= w.get("end_step", 99)
        and w.get("start_epoch", 1) <= w.get("end_epoch", 99)
    )
)


def is_used(settings, epoch, step):
    """What the keys say, for an epoch and a step counted from 0."""
    return settings.get("start_epoch", 1) <= epoch + 1 <= settings.get("end_epoch", math.inf) and settings.get(
        "start_step", 1
    ) <= step + 1 <= settings.get("end_step", math.inf)


@given(
    repeats=st.lists(st.integers(1, 3), min_size=3, max_size=15),
    first=windows,
    second=windows,
    always=st.fixed_dictionaries({}, optional={"probability": st.just(0.6)}),
    per_step=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_subsets_begin_and_end_exactly_where_they_should(repeats, first, second, always, per_step, seed):
    subsets = (first, second, always)

    def new_plan():
        return make_plan(
            repeats,
            per_step=per_step,
            seed=seed,
            subset_of=lambda n: n % 3,
            buckets=lambda n: (SQUARE, WIDE)[n % 4 == 0],
            subsets=subsets,
        )

    plan = new_plan()
    assert plan.problem(60) is None
    numbers = set()
    for epoch in range(7):
        steps = range(plan.first_step(epoch), plan.first_step(epoch + 1))
        assert len(steps) >= 1
        used = [n for n, settings in enumerate(subsets) if is_used(settings, epoch, steps[0])]
        for step in steps:
            assert plan.epoch_of(step) == epoch
            assert used == [n for n, settings in enumerate(subsets) if is_used(settings, epoch, step)]
            assert plan.step(step) == new_plan().step(step)  # resuming is recomputing
        batches = [batch for step in steps for batch in plan.step(step)]
        visits = Counter(visit.sample for batch in batches for visit in batch.visits)
        assert {sample % 3 for sample in visits} <= set(used)
        new = {visit for batch in batches for visit in batch.visits}
        assert len(new) == visits.total() and not new & numbers  # no visit has the number of another
        numbers |= new
        cut = used != [n for n, settings in enumerate(subsets) if is_used(settings, epoch, steps[-1] + 1)]
        for number, settings in enumerate(subsets):
            own = {sample: count for sample, count in enumerate(repeats) if sample % 3 == number}
            share = max(1, round(settings.get("probability", 1) * sum(own.values())))
            made = sum(count for sample, count in visits.items() if sample % 3 == number)
            if number in used and not cut:
                assert made == share
                if share == sum(own.values()):
                    assert all(visits[sample] == count for sample, count in own.items())
            else:
                assert made <= share * (number in used)
        assert all(
            batch.step_samples == sum(len(b.visits) for b in batches if b.step == batch.step) for batch in batches
        )


def test_an_epoch_ends_where_a_subset_begins():
    plan = make_plan([1] * 10, batch_sizes=(1,), subset_of=lambda n: n % 2, subsets=({}, {"start_step": 8}))
    assert plan.steps_per_epoch == 5 and plan.samples_per_epoch == 5
    assert [plan.first_step(epoch) for epoch in range(5)] == [0, 5, 7, 17, 27]
    assert [plan.epoch_of(step) for step in (0, 4, 5, 6, 7, 16, 17)] == [0, 0, 1, 1, 2, 2, 3]
    subsets = [[visit.sample % 2 for batch in plan.step(step) for visit in batch.visits] for step in range(17)]
    assert subsets[:7] == [[0]] * 7 and sorted(subsets[7:]) == [[0]] * 5 + [[1]] * 5


def test_a_first_epoch_that_is_cut_is_described_whole():
    plan = make_plan([1] * 10, batch_sizes=(1,), subset_of=lambda n: n % 2, subsets=({}, {"end_step": 3}))
    assert plan.first_step(1) == 3
    assert (plan.steps_per_epoch, plan.micro_batches_per_epoch, plan.samples_per_epoch) == (10, 10, 10)


def test_a_step_that_changes_nothing_ends_no_epoch():
    # the second subset's last step comes after its last epoch
    subsets = ({}, {"start_step": 2, "end_epoch": 2}, {"end_step": 3, "start_epoch": 3})
    plan = make_plan([1] * 12, batch_sizes=(1,), subset_of=lambda n: n % 3, subsets=subsets)
    starts = [plan.first_step(epoch) for epoch in range(4)]
    assert starts == [0, 1, 9, 13]


@pytest.mark.parametrize(
    ("subsets", "max_steps", "line"),
    [
        (({"end_step": 10}, {"start_step": 11}), 99, None),
        (({"end_step": 10}, {"start_step": 15}), 10, None),
        (
            ({"end_step": 10}, {"start_step": 15}),
            11,
            "no subset is used in steps 11 to 14; close the gap with start_step, end_step, start_epoch or end_epoch, "
            "or train for 10 steps",
        ),
        (
            ({"start_step": 8}, {"start_step": 6}),
            99,
            "no subset is used in steps 1 to 5; close the gap with start_step, end_step, start_epoch or end_epoch",
        ),
        (({"end_step": 7}, {"end_step": 8}), 9, "from step 9 (epoch 4) on; "),
        (({"end_epoch": 1}, {"end_epoch": 2}), 10, "from step 10 (epoch 3) on; "),
        (({"end_epoch": 1}, {"end_epoch": 2}), 9, None),
        (({"end_epoch": 2}, {"start_epoch": 5}), 100, "in epochs 3 to 4; "),
        (({"end_epoch": 2}, {"start_epoch": 4}), 100, "in epoch 3; "),
        (({"end_epoch": 2}, {"start_epoch": 3}), 10**9, None),
        (({"start_epoch": 2}, {"start_epoch": 2}), 1, "in epoch 1; "),
        (({"start_epoch": 2, "probability": 0.5}, {}), 10**9, None),
    ],
)
def test_steps_without_any_subset_are_a_problem(subsets, max_steps, line):
    # 3 pictures each, one per step: epochs of 3 steps, or 6 of both
    plan = make_plan([1] * 6, batch_sizes=(1,), subset_of=lambda n: n % 2, subsets=subsets)
    found = plan.problem(max_steps)
    assert found is None if line is None else found is not None and line in found
    assert "train for 0 steps" not in str(found)
    if line is None and max_steps < 1000:
        assert all(plan.step(step) for step in range(max_steps))


def test_a_step_without_any_subset_is_refused():
    plan = make_plan([1] * 3, subsets=({"end_step": 5},))
    assert plan.step(4)
    with pytest.raises(ValueError, match="no subset is used in step 5"):
        plan.step(5)
    assert plan.first_step(3) == 5 and plan.first_step(10) == 12  # more epochs than there are
    later = make_plan([1] * 3, subsets=({"start_epoch": 2},))
    assert (later.samples_per_epoch, later.micro_batches_per_epoch, later.steps_per_epoch) == (0, 0, 1)


def test_a_hundred_thousand_visits_are_planned_at_once():
    repeats = [1] * 100_000
    start = time.process_time()
    plan = make_plan(repeats, batch_sizes=(4,), buckets=lambda n: Resolution(64 * (1 + n % 40), 64))
    made = time.process_time()
    plan.step(plan.first_step(3))
    planned = time.process_time()
    assert planned - made < 10  # CPU seconds; 0.12 on an idle core
    assert made - start < 60  # mostly the samples
    (epoch,) = plan._recent.values()
    assert sum(map(sys.getsizeof, epoch)) < 2_500_000


def test_late_steps_of_a_plan_that_does_not_vary_are_found_at_once():
    plan = make_plan([1] * 7, batch_sizes=(1,))
    assert plan.epoch_of(7 * 10**15 + 3) == 10**15
    assert plan.step(7 * 10**15 + 3)[0].visits[0].visit == 10**15
