"""Which file of ``conditioning_data_dir`` is the loss mask, or the control picture, of which picture."""

from collections.abc import Mapping, Sequence

from library.data.file_index import FileFacts
from library.data.findings import Findings, counted, named
from library.data.folders import Folder, Folders
from library.data.listings import Listing
from library.io.places import FileEntry
from library.records import Resolution

MASK, CONTROL = "mask", "control picture"
"""What the files may be."""


def pair_masks(
    listing: Listing, listed: Mapping[str, Sequence[str]], folders: Folders, findings: Findings, *, what: str = MASK
) -> list[FileEntry]:
    """The mask of each picture of a subset: the file of the same stem, in the same sub-folder.

    Args:
        listing: The pictures that are used.
        listed: Stem -> names of all pictures of the subset, also of those that aren't used.
        folders: Lists folders.
        findings: Gets what is wrong or worth to know.
        what: ``MASK`` or ``CONTROL``, for people.

    Returns:
        One per picture; nothing when the subset has no masks, or when any is missing.
    """
    subset = listing.subset
    if subset.conditioning_data_dir is None or not listing.pictures:
        return []
    stems = listing.stems()
    deep = any("/" in stem for stem in stems)
    folder = folders.open(subset.conditioning_data_dir, recursive=deep)
    if folder is None:
        return []
    masks = [folder.by_stem.get(stem) for stem in stems]
    missing = [picture.name for picture, mask in zip(listing.pictures, masks) if mask is None]
    if missing:
        unreadable = folder.unreadable()
        findings.problems.append(
            f"{folder.path}: no {what} for {len(missing)} of {counted(len(masks), 'picture')}: {named(missing)}. A "
            f"{what} is named like its picture" + (f"; {unreadable}" if unreadable else "")
        )
        return []
    findings.notes += _notes(listing, listed, folder, what)
    return [mask for mask in masks if mask is not None]


def _notes(listing: Listing, listed: Mapping[str, Sequence[str]], folder: Folder, what: str) -> list[str]:
    notes = []
    extra = [entry.name for stem, entry in zip(folder.stems, folder.pictures) if stem not in listed]
    if extra:
        notes.append(f"{folder.path}: {counted(len(extra), what)} of no picture: {named(extra)}")
    if shared := [names for names in listed.values() if len(names) > 1]:
        notes.append(
            f"{folder.path}: {counted(len(shared), what)} used for several pictures of the same name, first for "
            f"{' and '.join(shared[0])}"
        )
    if several := sorted(folder.shared_stems.intersection(listed)):
        used = [folder.by_stem[stem].name for stem in several]
        notes.append(f"{folder.path}: {counted(len(several), 'picture')} with several {what}s, using {named(used)}")
    if listing.subset.alpha_mask and what == MASK:
        notes.append(f"{listing.subset.title}: masks come from {folder.path}; alpha_mask is not used")
    return notes


def check_shapes(
    listing: Listing,
    masks: Sequence[FileEntry],
    facts: Mapping[str, FileFacts],
    mask_facts: Mapping[str, FileFacts],
    findings: Findings,
    *,
    what: str = MASK,
) -> None:
    """This reports masks that have another shape than their picture. Another size is fine.

    Args:
        listing: The pictures.
        masks: Their masks.
        facts: Of pictures, by path.
        mask_facts: Of masks, by path.
        findings: Gets the problems.
        what: See ``pair_masks``.
    """
    wrong = []
    for picture, mask in zip(listing.pictures, masks):
        size, mask_size = facts[picture.path].size, mask_facts[mask.path].size
        if size != mask_size and not same_shape(size, mask_size):
            wrong.append(f"{mask.name} is {mask_size}, its picture {size}")
    if wrong:
        findings.problems.append(
            f"{listing.subset.conditioning_data_dir}: {counted(len(wrong), what)} of another shape than the picture: "
            f"{named(wrong)}"
        )


def same_shape(one: Resolution, other: Resolution) -> bool:
    """Whether one is the other scaled, with its sides rounded: scaled to match, a side differs by a pixel at most."""
    small, large = sorted((one, other), key=lambda size: size.area)
    at_width = abs(small.height * large.width - large.height * small.width) <= large.width
    at_height = abs(small.width * large.height - large.width * small.height) <= large.height
    return at_width or at_height
