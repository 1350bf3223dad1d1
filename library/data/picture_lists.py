"""Which pictures each subset has: those of its folder, or those that its metadata file lists."""

from collections.abc import Sequence

from library.config.dataset import DatasetConfig
from library.data.findings import Findings, counted
from library.data.folders import Folder, Folders
from library.data.formats import picture_extensions
from library.data.listings import Listing
from library.data.metadata_pictures import MetadataFiles, take_listed


def list_pictures(
    datasets: Sequence[DatasetConfig], folders: Folders, findings: Findings, *, skip_missing: bool
) -> list[Listing]:
    """This lists the pictures of every subset; one that has none is a problem.

    Args:
        datasets: Where to look.
        folders: Lists folders.
        findings: Gets what is wrong and what is left out.
        skip_missing: Leave out pictures that a metadata file lists and that aren't there.
    """
    listings = []
    files = MetadataFiles(findings)
    for number, dataset in enumerate(datasets):
        for position, subset in enumerate(dataset.subsets):
            listing = Listing(number, position, dataset, subset)
            if subset.metadata_file is None:
                _take_folder(listing, folders, findings)
            else:
                take_listed(listing, files, folders, findings, skip_missing=skip_missing)
            listings.append(listing)
    return listings


def _take_folder(listing: Listing, folders: Folders, findings: Findings) -> None:
    subset = listing.subset
    assert subset.image_dir is not None
    folder = folders.open(subset.image_dir, recursive=subset.recursive)
    if folder is None:
        return
    listing.home, listing.pictures = folder, folder.pictures
    if not listing.pictures:
        kinds = " ".join(extension.lstrip(".") for extension in picture_extensions())
        where = "this folder and its sub-folders" if subset.recursive else "this folder"
        findings.problems.append(f"{folder.path}: no pictures ({kinds}) in {where}{_hint(folder)}")
    elif unreadable := folder.unreadable():
        findings.notes.append(f"{folder.path}: {unreadable}")


def _hint(folder: Folder) -> str:
    """Why a folder may seem empty."""
    if unreadable := folder.unreadable():
        return f", but {unreadable}"
    if folder.recursive:
        return ""
    try:
        below = Folder(folder.path, recursive=True).pictures
    except OSError:
        return ""
    return f"; recursive = true reads {counted(len(below), 'picture')} in its sub-folders" if below else ""
