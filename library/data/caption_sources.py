"""Where the captions of a subset's pictures come from: files beside them, their names, one text for all, or a list.

What becomes of a caption at a visit is in ``captions``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from library.config.dataset import SubsetConfig
from library.data.file_index import FileIndex, TextProblem
from library.data.findings import Findings, counted, named
from library.data.folders import Folder
from library.data.listings import Listing
from library.io.places import FileEntry

_FACE_BOX = re.compile(r"(?:_\d+){4}$")
_NO_TEXT = ("",)


@dataclass
class _Files:
    """The caption files of a subset's pictures.

    Attributes:
        entries: One per picture; None without one.
        fallbacks: How many end in .caption where .txt was asked for.
        shared: Pictures that have their file in common, by its name.
    """

    entries: list[FileEntry | None] = field(default_factory=list)
    fallbacks: int = 0
    shared: dict[str, list[str]] = field(default_factory=dict)


def read_captions(listings: Sequence[Listing], index: FileIndex, findings: Findings) -> list[Sequence[tuple[str, ...]]]:
    """The lines that may be the caption of each picture, as the subset's caption strategy says.

    Args:
        listings: The pictures of each subset.
        index: Reads caption files, and remembers them.
        findings: Gets what is wrong or worth to know.

    Returns:
        Per subset, one tuple per picture: never empty; ``("",)`` without a caption.
    """
    files = [_files(listing) if listing.subset.captions_from == "textfile" else None for listing in listings]
    texts = _texts([entry for found in files if found is not None for entry in found.entries], index, findings)
    captions: list[Sequence[tuple[str, ...]]] = []
    for listing, found in zip(listings, files):
        if found is not None:
            captions.append(_from_files(listing, found, texts, findings))
        elif listing.subset.captions_from == "instanceprompt":
            captions.append([_class_tokens(listing.subset)] * len(listing.pictures))
        elif listing.subset.captions_from == "filename":
            captions.append([_from_name(stem) for stem in listing.stems()])
        else:
            captions.append(_from_metadata(listing, findings))
    return captions


def _files(listing: Listing) -> _Files:
    """The caption file of each picture: of the same stem, or of the stem without a face box at its end."""
    ending, stems, elsewhere = listing.subset.caption_extension, listing.stems(), listing.elsewhere
    at_home = {} if listing.home is None else listing.home.texts(ending)
    found = _Files(list(map(at_home.get, stems)))
    if elsewhere or not all(found.entries):
        for row, entry in enumerate(found.entries):
            if entry is None or elsewhere:
                folder = elsewhere.get(listing.pictures[row].path, listing.home)
                assert folder is not None
                entry = found.entries[row] = _file(folder, stems[row], ending)
                found.fallbacks += entry is not None and entry.name[-len(ending) :].lower() != ending.lower()
    if len(set(stems)) < len(stems):
        found.shared = _shared(listing, stems, found.entries)
    return found


def _file(folder: Folder, stem: str, ending: str) -> FileEntry | None:
    """The caption file of a picture, wherever it may be."""
    endings = (ending, ".caption") if ending == ".txt" else (ending,)
    for name in (stem, _FACE_BOX.sub("", stem)):
        for one in endings:
            if entry := folder.texts(one).get(name):
                return entry
    return None


def _shared(listing: Listing, stems: Sequence[str], entries: Sequence[FileEntry | None]) -> dict[str, list[str]]:
    """Caption files of several pictures with the same stem. Faces cut from one picture share one on purpose."""
    pictures: dict[str, list[str]] = {}
    for picture, stem, entry in zip(listing.pictures, stems, entries):
        if entry is not None and entry.name.startswith(stem + "."):
            pictures.setdefault(entry.path, []).append(picture.name)
    return {path: names for path, names in pictures.items() if len(names) > 1}


def _texts(entries: Sequence[FileEntry | None], index: FileIndex, findings: Findings) -> Mapping[str, tuple[str, ...]]:
    """The lines that say something of each caption file, by its path."""
    files = {entry.path: entry for entry in entries if entry is not None}
    texts: dict[str, tuple[str, ...]] = {}
    for path, text in zip(files, index.texts(list(files.values()))):
        if isinstance(text, TextProblem):
            findings.problems.append(f"{path}: {text}")
            texts[path] = _NO_TEXT
        else:
            texts[path] = lines_of(text)
    return texts


def lines_of(text: str) -> tuple[str, ...]:
    """The lines of a text that say something, without spaces around them."""
    lines = text.splitlines()
    if len(lines) == 1 and (line := lines[0].strip()):
        return (line,)
    return tuple(line for line in map(str.strip, lines) if line)


def _from_files(
    listing: Listing, files: _Files, texts: Mapping[str, tuple[str, ...]], findings: Findings
) -> list[tuple[str, ...]]:
    subset = listing.subset
    stand_in = _class_tokens(subset)
    captions = [stand_in if entry is None else texts[entry.path] for entry in files.entries]
    missing = [picture.name for picture, entry in zip(listing.pictures, files.entries) if entry is None]
    empty, many = sum(not lines for lines in captions), sum(len(lines) > 1 for lines in captions)
    if empty:
        captions = [lines or _NO_TEXT for lines in captions]
    if many and not subset.enable_wildcard:
        captions = [lines[:1] for lines in captions]
    _report_missing(listing, missing, f"caption ({subset.caption_extension})", "a caption file", findings)
    findings.notes += _file_notes(subset, files, empty, many)
    return captions


def _file_notes(subset: SubsetConfig, files: _Files, empty: int, many: int) -> Iterator[str]:
    title = subset.title
    if files.fallbacks:
        yield f"{title}: {counted(files.fallbacks, 'caption')} read from .caption instead of .txt"
    if empty:
        yield f"{title}: {counted(empty, 'caption file')} without text, used as an empty caption"
    if many and not subset.enable_wildcard:
        yield (
            f"{title}: {counted(many, 'caption file')} with several lines, of which the first is used "
            "(enable_wildcard uses all)"
        )
    if files.shared:
        first = next(iter(files.shared.values()))
        yield (
            f"{title}: {counted(len(files.shared), 'caption file')} used for several pictures of the same name, first "
            f"for {' and '.join(first)}"
        )


def _from_name(stem: str) -> tuple[str, ...]:
    """The file's name without its folders and its ending, with spaces for underscores."""
    return (stem.rpartition("/")[2].replace("_", " ").strip(),)


def _from_metadata(listing: Listing, findings: Findings) -> list[tuple[str, ...]]:
    subset = listing.subset
    stand_in, captions = _class_tokens(subset), listing.captions or []
    missing = [picture.name for picture, lines in zip(listing.pictures, captions) if not any(lines)]
    _report_missing(listing, missing, f"caption in {subset.metadata_file}", "a caption", findings)
    return [stand_in if not any(lines) else lines for lines in captions]


def _report_missing(listing: Listing, missing: Sequence[str], what: str, short: str, findings: Findings) -> None:
    """Pictures without a caption: an error, unless the subset has a text that stands in."""
    subset = listing.subset
    if not missing:
        return
    if subset.class_tokens is not None:
        findings.notes.append(
            f"{subset.title}: {counted(len(missing), 'picture')} without {short}, using {subset.class_tokens!r}"
        )
        return
    findings.problems.append(
        f"{subset.title}: no {what} and no class_tokens for {len(missing)} of "
        f"{counted(len(listing.pictures), 'picture')}: {named(missing)}. Write captions, or set class_tokens"
    )


def _class_tokens(subset: SubsetConfig) -> tuple[str, ...]:
    return (subset.class_tokens or "",)
