"""Which of the found samples are trained on: validation is held out, regularisation pictures are balanced."""

import itertools
from collections.abc import Collection, Iterable, Sequence

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.findings import Findings, counted
from library.randomness import seed_for
from library.records import Sample


def hold_out(
    datasets: Sequence[DatasetConfig], found: Sequence[Sample], default_seed: int, findings: Findings
) -> list[Sample]:
    """This chooses the validation samples: of each subset those whose content and seed hash below its fraction.

    So whether a picture is held out depends on nothing but its bytes: not on file names, nor on the other pictures.
    The exception are subsets so small that none or all of them would be: then one is moved (``held_out_contents``).
    Regularisation pictures of either kind are never held out. A dataset with the role of validation is held out whole.

    Args:
        datasets: The datasets, with their roles, seeds and fractions.
        found: All samples.
        default_seed: For datasets that name no seed.
        findings: Gets a note per dataset with validation samples.
    """
    chosen: list[Sample] = []
    if not any(_fraction(dataset, subset) for dataset in datasets for subset in dataset.subsets):
        return chosen
    parts = _by_subset(found)
    for number, dataset in enumerate(datasets):
        seed = default_seed if dataset.validation_seed is None else dataset.validation_seed
        asked, held_out, candidates = False, 0, 0
        for position, subset in enumerate(dataset.subsets):
            part = parts.get((number, position), [])
            fraction = _fraction(dataset, subset)
            asked |= fraction > 0
            candidates += 0 if _regularises(subset) else len(part)
            contents = held_out_contents((sample.content for sample in part), fraction, seed) if fraction else ()
            own = [_visited(sample, 1) for sample in part if sample.content in contents]
            held_out += len(own)
            chosen += own
        if asked:
            findings.notes.append(
                f"datasets[{number}]: {held_out} of {counted(candidates, 'picture')} held out for validation"
            )
    return chosen


def _fraction(dataset: DatasetConfig, subset: SubsetConfig) -> float:
    """What share of a subset is held out."""
    if dataset.role == "validation":
        return 1.0
    return 0.0 if _regularises(subset) else subset.validation_split


def _regularises(subset: SubsetConfig) -> bool:
    """Whether its pictures keep what the model knows, instead of being learned."""
    return subset.is_reg or subset.is_regularisation_data


def held_out_contents(contents: Iterable[str], fraction: float, seed: int) -> Collection[str]:
    """The contents that are held out of a subset: those that hash with the seed below the fraction.

    Where that gives none, the one with the lowest hash is held out, and where it gives all, the one with the highest
    is trained on. A subset of a single content is trained on.

    Args:
        contents: Hashes of the subset's pictures.
        fraction: What share of them is wanted, above 0; 1 gives all.
        seed: Of the choice.
    """
    distinct = set(contents)
    if fraction >= 1:
        return distinct
    if len(distinct) < 2:
        return set()
    threshold = fraction * 2**63
    ranks = {content: seed_for(seed, "validation", content) for content in distinct}
    chosen = {content for content, rank in ranks.items() if rank < threshold}
    if not chosen:
        return {min(ranks, key=ranks.__getitem__)}
    if len(chosen) == len(distinct):
        chosen.remove(max(ranks, key=ranks.__getitem__))
    return chosen


def for_training(
    datasets: Sequence[DatasetConfig], found: Sequence[Sample], validation: Sequence[Sample], findings: Findings
) -> list[Sample]:
    """This leaves out what is held out, copies of it included, and balances regularisation pictures.

    Args:
        datasets: The datasets.
        found: All samples.
        validation: The samples that are held out.
        findings: Gets a note per fact that changes what is trained on, and a problem where nothing is left.

    Returns:
        The samples by dataset, subset and name.
    """
    parts = _by_subset(_without(validation, datasets, found, findings) if validation else found)
    samples: list[Sample] = []
    for number, dataset in enumerate(datasets):
        own = [parts.get((number, position), []) for position in range(len(dataset.subsets))]
        learned = [
            subset.probability * _visits(part) for subset, part in zip(dataset.subsets, own) if not subset.is_reg
        ]
        visits = round(sum(learned))
        reg = [sample for subset, part in zip(dataset.subsets, own) if subset.is_reg for sample in part]
        if reg:
            balanced = balance(reg, visits)
            findings.notes.append(
                f"datasets[{number}]: {len(balanced)} of {counted(len(reg), 'regularisation picture')} used, "
                f"{counted(_visits(balanced), 'visit')} against {visits} of the others"
            )
            own = [
                [sample for sample in balanced if sample.subset == position] if subset.is_reg else part
                for position, (subset, part) in enumerate(zip(dataset.subsets, own))
            ]
        if 0 < visits < dataset.batch_size:
            findings.notes.append(
                f"datasets[{number}]: {counted(visits, 'visit')} per epoch, less than batch_size {dataset.batch_size}"
            )
        samples += itertools.chain.from_iterable(own)
    return samples


def balance(reg: Sequence[Sample], visits: int) -> list[Sample]:
    """This gives regularisation pictures about as many visits as the pictures to learn have.

    They are taken in order with their own repeats until ``visits`` is reached. When they run out, each gets one more
    repeat in turn. What isn't reached is left out.
    """
    repeats: list[int] = []
    total = 0
    for sample in reg:
        if total >= visits:
            break
        repeats.append(sample.num_repeats)
        total += sample.num_repeats
    if total < visits:
        each, more = divmod(visits - total, len(repeats))
        repeats = [count + each + (position < more) for position, count in enumerate(repeats)]
    return [_visited(sample, count) for sample, count in zip(reg, repeats)]


def _without(
    validation: Sequence[Sample], datasets: Sequence[DatasetConfig], found: Sequence[Sample], findings: Findings
) -> list[Sample]:
    """The samples that are neither held out nor copies of what is."""
    keys = {sample.key for sample in validation}
    contents = {sample.content for sample in validation}
    training = [sample for sample in found if sample.content not in contents]
    if copies := sum(sample.content in contents and sample.key not in keys for sample in found):
        findings.notes.append(
            f"{counted(copies, 'picture')} not trained on: the same content is held out for validation"
        )
    if all(sample.is_reg for sample in training):
        splits = any(subset.validation_split for dataset in datasets for subset in dataset.subsets)
        findings.problems.append(
            "validation_split leaves no picture to train on; lower it"
            if splits
            else 'every picture is held out for validation; the dataset with role = "validation" needs others'
        )
        return training
    before, after = _by_subset(found), _by_subset(training)
    for (number, position), part in before.items():
        subset = datasets[number].subsets[position]
        if datasets[number].role == "train" and subset.validation_split < 1 and (number, position) not in after:
            findings.problems.append(
                f"{subset.title}: none of {counted(len(part), 'picture')} is left to train on in datasets[{number}]: "
                "the same content is held out for validation elsewhere"
            )
    return training


def _by_subset(samples: Iterable[Sample]) -> dict[tuple[int, int], list[Sample]]:
    """The samples of each dataset and subset; they come in that order."""
    return {
        key: list(part) for key, part in itertools.groupby(samples, key=lambda sample: (sample.dataset, sample.subset))
    }


def _visits(samples: Iterable[Sample]) -> int:
    return sum(sample.num_repeats for sample in samples)


def _visited(sample: Sample, repeats: int) -> Sample:
    return sample if sample.num_repeats == repeats else sample._replace(num_repeats=repeats)
