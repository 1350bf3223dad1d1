"""The datasets' folders and files -> samples, for training and for validation.

Which pictures there are is found by ``picture_lists``, their captions by ``caption_sources``, their masks by
``mask_pairs``; ``selection`` decides what they are used for.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from library.config.dataset import DatasetConfig
from library.data.caption_sources import read_captions
from library.data.duplicates import Groups, look_alikes, same_content
from library.data.exclusions import leave_out, report_unreadable, with_masks
from library.data.file_index import FileFacts, FileIndex
from library.data.findings import Findings, Skipped, counted
from library.data.folders import Folders
from library.data.listings import Listing
from library.data.mask_pairs import CONTROL, MASK, check_shapes, pair_masks
from library.data.picture_lists import list_pictures
from library.data.selection import for_training, hold_out
from library.io.garbage import paused_collection
from library.io.places import FileEntry
from library.records import Sample

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Discovery:
    """What the datasets hold.

    Attributes:
        samples: What is trained on, by dataset, subset and file name.
        validation: What the loss is measured on; no content is in both.
        skipped: Pictures that were found and are left out: for their size or shape, or because they can't be read.
        duplicates: Groups of files of one dataset with the same content.
        near_duplicates: Groups of files of one dataset that look nearly the same; empty unless asked for.
        notes: Facts for the start-up report, one line each.
    """

    samples: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    skipped: tuple[Skipped, ...]
    duplicates: Groups
    near_duplicates: Groups
    notes: tuple[str, ...]


def discover(
    datasets: Sequence[DatasetConfig],
    index: FileIndex | None = None,
    *,
    skip_bad_images: bool = False,
    validation_seed: int = 0,
    decode: bool = False,
    steered: bool = False,
    near_duplicates: bool = False,
    progress: Progress | None = None,
) -> Discovery:
    """This finds the pictures, captions and masks of all datasets, and reads each file once.

    Args:
        datasets: Where to look.
        index: Remembers what is known about files; without one, every file is read anew.
        skip_bad_images: Leave out pictures that can't be read, with a note, instead of stopping.
        validation_seed: Of the choice of validation pictures, for datasets that name no seed of their own.
        decode: Decode every picture completely, to be sure that it can be; else only its header is looked at.
        steered: The folders ``conditioning_data_dir`` hold control pictures, not loss masks.
        near_duplicates: Look for pictures that look nearly the same.
        progress: Is told how many of how many new files have been read.

    Raises:
        ConfigError: All that is wrong with the folders, captions, pictures and masks, one line each.
    """
    index = index or FileIndex(None)
    findings = Findings()
    folders = Folders(findings)
    with paused_collection():
        listings = list_pictures(datasets, folders, findings, skip_missing=skip_bad_images)
        listed = [_by_stem(listing) for listing in listings]
    facts = _picture_facts(listings, index, decode=decode, near=near_duplicates, progress=progress)
    report_unreadable("picture", facts, findings, skipped=skip_bad_images)
    for listing in listings:
        leave_out(listing, facts, findings, skip_bad=skip_bad_images)
    what = CONTROL if steered else MASK
    masks = [pair_masks(listing, names, folders, findings, what=what) for listing, names in zip(listings, listed)]
    # control pictures are kept nowhere, so nothing else will have decoded them
    mask_facts = _mask_facts(masks, index, decode=decode or steered, progress=progress)
    report_unreadable(what, mask_facts, findings, skipped=skip_bad_images)
    for number, listing in enumerate(listings):
        masks[number] = with_masks(listing, masks[number], mask_facts, findings, skip_bad=skip_bad_images, what=what)
        check_shapes(listing, masks[number], facts, mask_facts, findings, what=what)
    with paused_collection():
        captions = read_captions(listings, index, findings)
        findings.stop_at_problems()
        found: list[Sample] = []
        for listing, lines, own in zip(listings, captions, masks):
            found += _samples(listing, lines, own, facts, mask_facts, findings, steered=steered)
        findings.notes += _used_twice(found)
        validation = hold_out(datasets, found, validation_seed, findings)
        training = for_training(datasets, found, validation, findings)
        findings.stop_at_problems()
        hashes = {fact.content: fact.near for fact in facts.values() if near_duplicates and fact.near is not None}
        return Discovery(
            samples=tuple(training),
            validation=tuple(validation),
            skipped=tuple(findings.skipped),
            duplicates=same_content(found),
            near_duplicates=look_alikes(found, hashes) if near_duplicates else (),
            notes=tuple(dict.fromkeys(findings.notes)),
        )


def _used_twice(samples: Sequence[Sample]) -> Iterator[str]:
    """A line for each dataset of which several subsets have the same files."""
    for number, part in itertools.groupby(samples, key=attrgetter("dataset")):
        own = list(part)
        if own[0].subset != own[-1].subset and (more := len(own) - len({sample.path for sample in own})):
            yield f"datasets[{number}]: {counted(more, 'picture')} used again, in another of its subsets"


def _by_stem(listing: Listing) -> dict[str, list[str]]:
    """The names of the pictures by their stems, for subsets with masks, whose names are compared with them."""
    names: dict[str, list[str]] = {}
    if listing.subset.conditioning_data_dir is not None:
        for stem, picture in zip(listing.stems(), listing.pictures):
            names.setdefault(stem, []).append(picture.name)
    return names


def _picture_facts(
    listings: Sequence[Listing], index: FileIndex, *, decode: bool, near: bool, progress: Progress | None
) -> dict[str, FileFacts]:
    """What is known about each picture, by path; faces are looked for only where crops go around them."""
    plain: dict[str, FileEntry] = {}
    with_faces: dict[str, FileEntry] = {}
    for listing in listings:
        entries = with_faces if listing.wants_faces else plain
        entries.update((picture.path, picture) for picture in listing.pictures)
    facts: dict[str, FileFacts] = {}
    if not with_faces.keys().isdisjoint(plain):
        plain = {path: entry for path, entry in plain.items() if path not in with_faces}
    for entries, faces in ((plain, False), (with_faces, True)):
        if entries:
            own = index.facts(list(entries.values()), decode=decode, faces=faces, near=near, progress=progress)
            facts.update(zip(entries, own))
    return facts


def _mask_facts(
    masks: Sequence[Sequence[FileEntry]], index: FileIndex, *, decode: bool, progress: Progress | None
) -> dict[str, FileFacts]:
    entries = {mask.path: mask for own in masks for mask in own}
    return dict(zip(entries, index.facts(list(entries.values()), decode=decode, progress=progress))) if entries else {}


def _samples(
    listing: Listing,
    captions: Sequence[tuple[str, ...]],
    masks: Sequence[FileEntry],
    facts: Mapping[str, FileFacts],
    mask_facts: Mapping[str, FileFacts],
    findings: Findings,
    *,
    steered: bool,
) -> list[Sample]:
    """The samples of one subset."""
    number, position, subset = listing.number, listing.position, listing.subset
    prefix, wants_faces = f"{number}/{position}/", listing.wants_faces
    repeats, is_reg = subset.num_repeats, subset.is_reg
    samples = []
    for row, (picture, lines) in enumerate(zip(listing.pictures, captions)):
        path = picture.path
        fact = facts[path]
        beside = masks[row].path if masks else None
        beside_content = "" if beside is None else mask_facts[beside].content
        samples.append(
            Sample(
                key=prefix + picture.name,
                path=path,
                content=fact.content,
                captions=lines,
                size=fact.size,
                dataset=number,
                subset=position,
                num_repeats=repeats,
                is_reg=is_reg,
                mask=None if steered else beside,
                mask_content="" if steered else beside_content,
                focus=fact.face if wants_faces else None,
                control=beside if steered else None,
                control_content=beside_content if steered else "",
            )
        )
    if wants_faces and (faceless := sum(sample.focus is None for sample in samples)):
        findings.notes.append(
            f"{subset.title}: no face in {faceless} of {counted(len(samples), 'picture')}, cropped in the middle"
        )
    return samples
