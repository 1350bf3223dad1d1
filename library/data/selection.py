"""Which of the found samples are trained on: validation is held out, regularisation pictures are balanced."""

import dataclasses
from collections.abc import Mapping, Sequence

from library.config.dataset import DatasetConfig
from library.randomness import seed_for
from library.records import Sample


def hold_out(
    datasets: Sequence[DatasetConfig],
    found: Sequence[Sample],
    contents: Mapping[str, str],
    default_seed: int,
    notes: list[str],
) -> list[Sample]:
    """This chooses the validation samples: in each dataset the pictures whose contents hash lowest.

    Whether a picture is chosen hardly depends on the others, and not at all on file names or on what draws were made.

    Args:
        datasets: Each with the fraction to hold out.
        found: All samples.
        contents: File path -> content hash.
        default_seed: For datasets that name no seed.
        notes: Gets a line per dataset with validation samples.
    """
    chosen: list[Sample] = []
    for number, dataset in enumerate(datasets):
        if not dataset.validation_split:
            continue
        seed = default_seed if dataset.validation_seed is None else dataset.validation_seed
        candidates = [sample for sample in found if sample.dataset == number and not sample.is_reg]

        def rank(sample: Sample, seed: int = seed) -> tuple[int, str]:
            return seed_for(seed, "validation", contents[sample.path]), sample.key

        count = round(len(candidates) * dataset.validation_split)
        keys = {sample.key for sample in sorted(candidates, key=rank)[:count]}
        chosen += [dataclasses.replace(sample, num_repeats=1) for sample in candidates if sample.key in keys]
        notes.append(f"datasets[{number}]: {count} of {counted(len(candidates), 'picture')} held out for validation")
    return chosen


def for_training(
    datasets: Sequence[DatasetConfig],
    found: Sequence[Sample],
    validation: Sequence[Sample],
    contents: Mapping[str, str],
    notes: list[str],
) -> list[Sample]:
    """This leaves out what is held out, copies of it included, and balances regularisation pictures.

    Args:
        datasets: For the report.
        found: All samples.
        validation: The samples that are held out.
        contents: File path -> content hash.
        notes: Gets a line per fact that changes what is trained on.
    """
    held_out = {sample.key for sample in validation}
    held_out_contents = {contents[sample.path] for sample in validation}
    rest = [sample for sample in found if sample.key not in held_out]
    training = [sample for sample in rest if contents[sample.path] not in held_out_contents]
    if copies := len(rest) - len(training):
        notes.append(f"{counted(copies, 'picture')} not trained on: the same content is held out for validation")
    samples: list[Sample] = []
    for number, dataset in enumerate(datasets):
        own = [sample for sample in training if sample.dataset == number and not sample.is_reg]
        reg = [sample for sample in training if sample.dataset == number and sample.is_reg]
        visits = sum(sample.num_repeats for sample in own)
        if reg:
            balanced = balance(reg, visits)
            notes.append(
                f"datasets[{number}]: {len(balanced)} of {counted(len(reg), 'regularisation picture')} used, "
                f"{counted(sum(sample.num_repeats for sample in balanced), 'visit')} against {visits} of the others"
            )
            reg = balanced
        if 0 < visits < dataset.batch_size:
            notes.append(
                f"datasets[{number}]: {counted(visits, 'visit')} per epoch, less than batch_size {dataset.batch_size}"
            )
        samples += sorted([*own, *reg], key=lambda sample: sample.subset)
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
    position = 0
    while total < visits:
        repeats[position % len(repeats)] += 1
        total += 1
        position += 1
    return [dataclasses.replace(sample, num_repeats=count) for sample, count in zip(reg, repeats)]


def counted(count: int, what: str) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
