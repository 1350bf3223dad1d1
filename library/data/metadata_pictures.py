"""The pictures that a metadata file lists: exactly those, wherever they are."""

import os
import posixpath
from collections.abc import Mapping, Sequence

from library.config.dataset import SubsetConfig
from library.config.errors import ConfigError
from library.config.urls import is_remote
from library.data.findings import Findings, counted, named
from library.data.folders import Folder, Folders, stem_of
from library.data.listings import Listing
from library.data.metadata_files import MetadataEntry, read_metadata
from library.io.places import FileEntry, join


class MetadataFiles:
    """Reads metadata files, each once."""

    def __init__(self, findings: Findings):
        """Files that can't be used are reported to ``findings``."""
        self._findings = findings
        self._known: dict[tuple[str | bool | None, ...], Mapping[str, MetadataEntry]] = {}

    def read(self, subset: SubsetConfig) -> Mapping[str, MetadataEntry]:
        """What the subset's file says about each picture that it names; nothing when it can't be used."""
        assert subset.metadata_file is not None
        columns = subset.filename_column, subset.caption_column
        key = subset.metadata_file, *columns, subset.caption_separator, subset.enable_wildcard
        if key not in self._known:
            self._known[key] = {}
            try:
                self._known[key] = read_metadata(subset.metadata_file, subset)
            except ConfigError as error:
                self._findings.problems += str(error).splitlines()
            else:
                if not self._known[key]:
                    self._findings.problems.append(f"{subset.metadata_file}: lists no pictures")
        return self._known[key]


def take_listed(
    listing: Listing, files: MetadataFiles, folders: Folders, findings: Findings, *, skip_missing: bool
) -> None:
    """This gives a listing the pictures, with their captions, that its subset's metadata file names.

    Args:
        listing: Gets them, by name.
        files: Reads metadata files.
        folders: Lists folders.
        findings: Gets what is wrong.
        skip_missing: Leave out pictures that aren't there.
    """
    subset, source = listing.subset, listing.subset.metadata_file
    entries = files.read(subset)
    if subset.image_dir is None:
        relative = [name for name in entries if not (is_remote(name) or os.path.isabs(name))]
        if relative:
            findings.problems.append(
                f"{source}: {counted(len(relative), 'relative name')} of pictures without image_dir, the folder where "
                f"they start: {named(relative)}"
            )
            return
    search = _Search(subset, folders, recursive=any("/" in name or "\\" in name for name in entries))
    listing.home = search.home
    if not entries or (subset.image_dir is not None and search.home is None):
        return
    found: dict[str, tuple[FileEntry, tuple[str, ...]]] = {}
    missing, repeated = [], []
    for name, entry in entries.items():
        picture = search.find(name)
        if picture is None:
            missing.append(name)
        elif picture.path in found:
            repeated.append(name)
        else:
            found[picture.path] = picture, entry.captions
    in_order = sorted(found.values(), key=lambda pair: pair[0].name)
    listing.pictures = [picture for picture, _ in in_order]
    listing.captions = [lines for _, lines in in_order]
    listing.elsewhere = search.elsewhere
    if search.ambiguous:
        choices = [f"{name} ({' or '.join(endings)})" for name, endings in search.ambiguous.items()]
        findings.problems.append(
            f"{source}: {counted(len(choices), 'name')} of several pictures; write the endings: {named(choices)}"
        )
    if missing := [name for name in missing if name not in search.ambiguous]:
        _report_missing(listing, missing, len(entries), findings, skip_missing=skip_missing)
    if repeated:
        findings.notes.append(
            f"{source}: {counted(len(repeated), 'picture')} listed before under another name, used once: "
            f"{named(repeated)}"
        )
    if search.home is not None:
        others = sum(entry.path not in found for entry in search.home.pictures)
        if others:
            findings.notes.append(f"{search.home.path}: {counted(others, 'picture')} not used, not listed in {source}")


def _report_missing(
    listing: Listing, missing: Sequence[str], count: int, findings: Findings, *, skip_missing: bool
) -> None:
    """The pictures that are listed and not there: left out when asked, else they stop the run."""
    subset = listing.subset
    where = "" if subset.image_dir is None else f" in {subset.image_dir}"
    line = f"{subset.metadata_file}: {len(missing)} of {counted(count, 'picture')} not found{where}: {named(missing)}"
    if not skip_missing:
        findings.problems.append(f"{line}. Add or unlist them, or start with --skip_bad_images")
        return
    findings.notes.append(f"{line}; left out (--skip_bad_images)")
    for name in missing:
        listing.skip(name, "not found", findings)
    if not listing.pictures:
        findings.problems.append(f"{subset.metadata_file}: none of its pictures can be found{where}")


class _Search:
    """Finds the files of the pictures that a metadata file names.

    A name is a place below ``image_dir``, or an absolute path, or a URL, with or without the file's ending.
    """

    def __init__(self, subset: SubsetConfig, folders: Folders, *, recursive: bool):
        self._folders = folders
        self._start = subset.image_dir or os.path.dirname(str(subset.metadata_file))
        self._root = self._start.rstrip("/") if is_remote(self._start) else os.path.abspath(self._start)
        self._below = self._root.rstrip("/" + os.sep) + ("/" if is_remote(self._start) else os.sep)
        self.home: Folder | None = None
        if subset.image_dir is not None:
            self.home = folders.open(subset.image_dir, recursive=recursive or subset.recursive)
        self.ambiguous: dict[str, list[str]] = {}
        """Names that several pictures have -> these pictures."""
        self.elsewhere: dict[str, Folder] = {}
        """Pictures that aren't in ``home`` -> their folder."""

    def find(self, name: str) -> FileEntry | None:
        """The picture of that name; None without one, and with several."""
        if self.home is not None:
            entry = self.home.by_name.get(name.removeprefix(self._below))  # nearly always; the rest takes longer
            if entry is not None:
                return entry
        path = self._path(name)
        separator = "/" if is_remote(path) else os.sep
        if self.home is not None and path.startswith(self._below):
            return self._look_up(name, self.home, path[len(self._below) :].replace(separator, "/"))
        parent, _, rest = path.rpartition(separator)
        folder = self._folders.open(parent or separator, recursive=False, may_be_missing=True)
        return None if folder is None else self._look_up(name, folder, rest)

    def _path(self, name: str) -> str:
        if is_remote(name):
            return name
        if is_remote(self._start):
            return join(self._start, posixpath.normpath(name.replace("\\", "/")))
        path = os.path.join(self._root, name)
        if "\\" in name and not os.path.exists(path):  # written on Windows
            path = path.replace("\\", os.sep)
        return os.path.abspath(path)

    def _look_up(self, name: str, folder: Folder, rest: str) -> FileEntry | None:
        entry = folder.by_name.get(rest)
        if entry is None:
            if rest in folder.shared_stems:
                self.ambiguous[name] = [one.name for one in folder.pictures if stem_of(one.name) == rest]
                return None
            entry = folder.by_stem.get(rest)
        if entry is None or folder is self.home:
            return entry
        self.elsewhere[entry.path] = folder
        return entry._replace(name=self._key(entry.path))

    def _key(self, path: str) -> str:
        """The name of a picture outside ``image_dir``; moving all folders together doesn't change it."""
        if is_remote(path) or is_remote(self._start):
            return path
        try:
            return os.path.relpath(path, self._root).replace(os.sep, "/")
        except ValueError:  # another drive
            return path
