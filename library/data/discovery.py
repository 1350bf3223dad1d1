"""Folders of pictures and caption files -> samples, for training and for validation."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.file_index import FileFacts, FileIndex
from library.data.selection import counted, for_training, hold_out
from library.records import Sample

PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_MOST_NAMED = 5


@dataclass(frozen=True)
class Discovery:
    """What the datasets hold.

    Attributes:
        samples: What is trained on, by dataset, subset and file name.
        validation: What the loss is measured on; no content is in both.
        contents: File path -> content hash, for all samples.
        notes: Facts for the start-up report, one line each.
    """

    samples: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    contents: Mapping[str, str]
    notes: tuple[str, ...]


def discover(
    datasets: Sequence[DatasetConfig],
    index: FileIndex | None = None,
    *,
    skip_bad_images: bool = False,
    validation_seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Discovery:
    """This finds the pictures and captions of all datasets, and looks into each picture once.

    Args:
        datasets: Where to look.
        index: Remembers what is known about files; without one, every picture is read anew.
        skip_bad_images: Leave out pictures that can't be read, with a note, instead of stopping.
        validation_seed: Of the choice of validation pictures, for datasets that name no seed of their own.
        progress: Is told how many of how many new files have been read.

    Raises:
        ConfigError: All that is wrong with the folders, captions and pictures, one line each.
    """
    problems: list[str] = []
    notes: list[str] = []
    listed = [
        (number, position, subset, _pictures(subset.image_dir, problems))
        for number, dataset in enumerate(datasets)
        for position, subset in enumerate(dataset.subsets)
    ]
    paths = [os.path.join(subset.image_dir, name) for _, _, subset, names in listed for name in names]
    facts = (index or FileIndex(None)).facts(paths, progress)
    _report_bad(facts, notes if skip_bad_images else problems, skipped=skip_bad_images)
    found: list[Sample] = []
    for number, position, subset, names in listed:
        usable = [name for name in names if facts[os.path.join(subset.image_dir, name)].problem is None]
        if names and not usable and skip_bad_images:
            problems.append(f"{subset.image_dir}: no picture can be read")
        found += _samples_of(number, position, subset, usable, facts, problems, notes)
    if problems:
        raise ConfigError("\n".join(problems))
    contents = {path: fact.content for path, fact in facts.items()}
    validation = hold_out(datasets, found, contents, validation_seed, notes)
    training = for_training(datasets, found, validation, contents, notes)
    if not training:
        raise ConfigError("validation_split leaves no picture to train on; lower it")
    return Discovery(tuple(training), tuple(validation), contents, tuple(notes))


def _pictures(folder: str, problems: list[str]) -> list[str]:
    """The names of the pictures in a folder, sorted."""
    try:
        with os.scandir(folder) as entries:
            # names that begin with a dot are other programs' notes, such as ._cat.jpg of macOS
            found = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        problems.append(f"{folder}: can't be read ({error.strerror})")
        return []
    names = sorted(name for name, is_folder in found if not is_folder and name.lower().endswith(PICTURE_EXTENSIONS))
    if not names:
        kinds = " ".join(extension[1:] for extension in PICTURE_EXTENSIONS)
        hint = "; its sub-folders are not read" if any(is_folder for _, is_folder in found) else ""
        problems.append(f"{folder}: no pictures ({kinds}) in this folder{hint}")
    return names


def _report_bad(facts: Mapping[str, FileFacts], lines: list[str], *, skipped: bool) -> None:
    bad = {path: fact.problem for path, fact in facts.items() if fact.problem is not None}
    if not bad:
        return
    if skipped:
        lines.append(f"{counted(len(bad), 'picture')} left out that can't be read (--skip_bad_images):")
    else:
        lines.append(
            f"{counted(len(bad), 'picture')} can't be read; repair or remove, or start with --skip_bad_images:"
        )
    lines += [f"{path}: {problem}" for path, problem in bad.items()]


def _samples_of(
    number: int,
    position: int,
    subset: SubsetConfig,
    names: Sequence[str],
    facts: Mapping[str, FileFacts],
    problems: list[str],
    notes: list[str],
) -> list[Sample]:
    samples: list[Sample] = []
    missing: list[str] = []
    kinds: Counter[str] = Counter()
    for name in names:
        path = os.path.join(subset.image_dir, name)
        try:
            lines = _caption_lines(path, subset.caption_extension, kinds)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        if lines is None:
            missing.append(name)
            lines = [subset.class_tokens or ""]
        samples.append(
            Sample(
                key=f"{number}/{position}/{name}",
                path=path,
                captions=tuple(lines if subset.enable_wildcard else lines[:1]),
                size=facts[path].size,
                dataset=number,
                subset=position,
                num_repeats=subset.num_repeats,
                is_reg=subset.is_reg,
            )
        )
    if missing and subset.class_tokens is None:
        problems.append(
            f"{subset.image_dir}: no caption ({subset.caption_extension}) and no class_tokens for {len(missing)} of "
            f"{counted(len(names), 'picture')}: {_listed(missing)}. Write captions, or set class_tokens"
        )
    notes += _caption_notes(subset, len(missing), kinds)
    return samples


def _caption_lines(path: str, extension: str, kinds: Counter[str]) -> list[str] | None:
    """The lines of a picture's caption file that say something (``[""]`` when none does); None without a file."""
    stem = os.path.splitext(path)[0]
    for candidate in (extension, ".caption") if extension == ".txt" else (extension,):
        file = stem + candidate
        try:
            with open(file, "rb") as opened:
                text = opened.read().decode("utf-8-sig")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise OSError(f"{file}: can't be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: byte {error.start + 1} is not UTF-8; save the caption as UTF-8") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        kinds["fallback"] += candidate != extension
        kinds["empty"] += not lines
        kinds["many"] += len(lines) > 1
        return lines or [""]
    return None


def _caption_notes(subset: SubsetConfig, missing: int, kinds: Counter[str]) -> list[str]:
    folder = subset.image_dir
    notes = []
    if missing and subset.class_tokens is not None:
        notes.append(f"{folder}: {counted(missing, 'picture')} without a caption file, using {subset.class_tokens!r}")
    if kinds["fallback"]:
        notes.append(f"{folder}: {counted(kinds['fallback'], 'caption')} read from .caption instead of .txt")
    if kinds["empty"]:
        notes.append(f"{folder}: {counted(kinds['empty'], 'caption file')} without text, used as an empty caption")
    if kinds["many"] and not subset.enable_wildcard:
        notes.append(
            f"{folder}: {counted(kinds['many'], 'caption file')} with several lines, of which the first is used "
            "(enable_wildcard uses all)"
        )
    return notes


def _listed(names: Iterable[str]) -> str:
    """The first few names."""
    names = list(names)
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
