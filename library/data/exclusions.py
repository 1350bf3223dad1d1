"""Pictures that were found and can't be used, or shall not be: broken ones, and those of an unwanted size or shape."""

from collections import Counter
from collections.abc import Mapping

from library.data.buckets import exclusion
from library.data.file_index import FileFacts
from library.data.findings import Findings, counted
from library.data.folders import ending_of
from library.data.formats import unreadable_extensions
from library.data.listings import Listing
from library.io.places import FileEntry


def report_unreadable(what: str, facts: Mapping[str, FileFacts], findings: Findings, *, skipped: bool) -> None:
    """This lists the files that can't be read as pictures, with the reason for each.

    Args:
        what: What the files are: ``picture``, ``mask``, ``control picture``.
        facts: By path.
        findings: Gets the lines.
        skipped: They are left out; else they stop the run.
    """
    bad = {path: fact.problem for path, fact in facts.items() if fact.problem is not None}
    if not bad:
        return
    packages = unreadable_extensions()
    lines = findings.notes if skipped else findings.problems
    if skipped:
        lines.append(f"{counted(len(bad), what)} left out that can't be read (--skip_bad_images):")
    else:
        lines.append(f"{counted(len(bad), what)} can't be read; repair or remove, or start with --skip_bad_images:")
    for path, problem in bad.items():
        package = packages.get(ending_of(path))
        lines.append(f"{path}: {problem}" + (f"; pip install {package} reads this kind" if package else ""))


def leave_out(listing: Listing, facts: Mapping[str, FileFacts], findings: Findings, *, skip_bad: bool) -> None:
    """This takes the pictures out of a listing that can't be read or that its dataset excludes.

    A listing that had pictures and has none left is a problem.

    Args:
        listing: The pictures of one subset.
        facts: Of its pictures, by path.
        findings: Gets what is left out, and why.
        skip_bad: Whether unreadable pictures are left out rather than reported as problems.
    """
    dataset, count = listing.dataset, len(listing.pictures)
    own = [facts[picture.path] for picture in listing.pictures]
    reasons = {size: exclusion(size, dataset) for size in {fact.size for fact in own if fact.problem is None}}
    unreadable = sum(fact.problem is not None for fact in own)
    if not unreadable and not any(reasons.values()):
        return
    excluded: Counter[str] = Counter()
    wanted = []
    for picture, fact in zip(listing.pictures, own):
        reason = fact.problem
        if reason is None:
            reason = reasons[fact.size]
            if reason is not None:
                excluded[_setting(reason)] += 1
        wanted.append(reason is None)
        if reason is not None:
            listing.skip(picture.path, reason, findings)
    listing.keep(wanted)
    title, where = listing.subset.title, f"datasets[{listing.number}]"
    findings.notes += [
        f"{title}: {counted(number, 'picture')} left out of {where} by {setting}"
        for setting, number in excluded.items()
    ]
    if listing.pictures or not count:
        return
    if unreadable == count:
        if skip_bad:
            findings.problems.append(f"{title}: no picture can be read")
    elif skip_bad or not unreadable:
        why = [f"{number} left out by {setting}" for setting, number in excluded.items()]
        why += [f"{unreadable} can't be read"] if unreadable else []
        findings.problems.append(f"{title}: none of {counted(count, 'picture')} is used in {where}: {', '.join(why)}")


def with_masks(
    listing: Listing,
    masks: list[FileEntry],
    facts: Mapping[str, FileFacts],
    findings: Findings,
    *,
    skip_bad: bool,
    what: str = "mask",
) -> list[FileEntry]:
    """This takes the pictures out of a listing whose masks can't be read.

    Args:
        listing: The pictures of one subset.
        masks: Their masks; none when the subset has no masks.
        facts: Of masks, by path.
        findings: Gets what is left out.
        skip_bad: Whether such pictures are left out rather than reported as problems.
        what: What they are called.

    Returns:
        The masks of the pictures that stay.
    """
    wanted = [facts[mask.path].problem is None for mask in masks]
    if all(wanted):
        return masks
    for picture, keep in zip(listing.pictures, wanted):
        if not keep:
            listing.skip(picture.path, f"its {what} can't be read", findings)
    listing.keep(wanted)
    if skip_bad:
        title = listing.subset.title
        findings.notes.append(f"{title}: {counted(wanted.count(False), 'picture')} left out with an unreadable {what}")
        if not listing.pictures:
            findings.problems.append(f"{listing.subset.conditioning_data_dir}: no {what} can be read")
    return [mask for mask, keep in zip(masks, wanted) if keep]


def _setting(reason: str) -> str:
    """The setting that excludes a picture, without the picture's own numbers: ``minimum_image_size 512``."""
    return " ".join(reason.split()[-2:])
