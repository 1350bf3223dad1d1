"""Folders of a dataset, each listed once however many subsets ask for it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from operator import attrgetter

from library.data.findings import Findings, counted
from library.data.formats import picture_extensions, unreadable_extensions
from library.io.places import FileEntry, list_files


class Folder:
    """The files of one folder, found by name, by stem or by ending.

    Names are relative to the folder, with "/" between their parts. A stem is a name without its ending.
    """

    def __init__(self, path: str, *, recursive: bool):
        """This lists the folder.

        Args:
            path: A folder, or its URL.
            recursive: Whether its sub-folders belong to it.

        Raises:
            OSError: It can't be listed.
        """
        self.path = path
        self.recursive = recursive
        self.entries = list_files(path, recursive=recursive)
        self._texts: dict[str, Mapping[str, FileEntry]] = {}
        self._kinds: defaultdict[str, list[FileEntry]] = defaultdict(list)
        for entry in self.entries:
            name = entry.name
            self._kinds[name[name.rfind(".") :]].append(entry)

    @cached_property
    def pictures(self) -> list[FileEntry]:
        """The files that can be read as pictures, going by their ending, by name."""
        return sorted(self._of_kinds(picture_extensions()), key=attrgetter("name"))

    @cached_property
    def by_name(self) -> Mapping[str, FileEntry]:
        """All files."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def stems(self) -> list[str]:
        """The stems of the pictures."""
        return [name[: name.rfind(".")] for name in map(attrgetter("name"), self.pictures)]

    @cached_property
    def by_stem(self) -> Mapping[str, FileEntry]:
        """The pictures, the first of each stem."""
        return {stem: entry for stem, entry in zip(reversed(self.stems), reversed(self.pictures))}

    @cached_property
    def shared_stems(self) -> frozenset[str]:
        """The stems that several pictures have."""
        if len(self.by_stem) == len(self.pictures):
            return frozenset()
        return frozenset(stem for stem, count in Counter(self.stems).items() if count > 1)

    def texts(self, ending: str) -> Mapping[str, FileEntry]:
        """The files with an ending such as ``.txt`` by their stem; where only capitals differ, ``.txt`` goes first."""
        if ending not in self._texts:
            length, lower = len(ending), ending.lower()
            found = list(self._of_kinds((lower[lower.rfind(".") :],)))
            if lower.rfind(".") > 0:  # such as .tags.txt
                found = [entry for entry in found if entry.name[-length:].lower() == lower]
            if len(found) > len(self._kinds.get(ending, ())):
                found.sort(key=lambda entry: entry.name.endswith(ending))
            self._texts[ending] = {entry.name[:-length]: entry for entry in found}
        return self._texts[ending]

    def _of_kinds(self, endings: Iterable[str]) -> Iterator[FileEntry]:
        """The files with these endings, which are in small letters; those of the files needn't be."""
        wanted = frozenset(endings)
        for ending, entries in self._kinds.items():
            if ending.lower() in wanted:
                yield from entries

    def unreadable(self) -> str:
        """What of its pictures can't be read here, and what to install; empty when there are none."""
        counts = {ending: sum(1 for _ in self._of_kinds([ending])) for ending in unreadable_extensions()}
        return ", ".join(
            f"{counted(counts[ending], f'{ending} picture')} not read (pip install {package})"
            for ending, package in unreadable_extensions().items()
            if counts[ending]
        )


class Folders:
    """Lists folders, and keeps what it listed."""

    def __init__(self, findings: Findings):
        """Folders that can't be listed are reported to ``findings``."""
        self._findings = findings
        self._known: dict[tuple[str, bool], Folder | None] = {}

    def open(self, path: str, *, recursive: bool, may_be_missing: bool = False) -> Folder | None:
        """The folder, or None when it can't be listed.

        Args:
            path: A folder, or its URL.
            recursive: Whether its sub-folders belong to it.
            may_be_missing: Don't report it when there is no such folder.
        """
        key = (path, recursive)
        if key not in self._known:
            try:
                self._known[key] = Folder(path, recursive=recursive)
            except OSError as error:
                self._known[key] = None
                if not (may_be_missing and isinstance(error, FileNotFoundError)):
                    self._findings.problems.append(f"{path}: can't be read ({error.strerror or error})")
        return self._known[key]


def ending_of(name: str) -> str:
    """What follows the last dot, with it, in small letters."""
    return name[name.rfind(".") :].lower()


def stem_of(name: str) -> str:
    """The name without its ending; its folders stay."""
    dot = name.rfind(".")
    return name[:dot] if dot > name.rfind("/") + 1 else name
