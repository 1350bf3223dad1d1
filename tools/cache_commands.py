"""What ``tools.cache`` does, command by command; each returns the exit code."""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from library.cli import SCRIPTS, Script, checked_configuration, configure_logging, refused_options
from library.config.command_line import CommandLine, help_text, read_command_line
from library.config.documents import MOST_TOML_BYTES, read_text
from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.data.store_care import STORES, Contents, Progress, StoreCare
from library.families import FAMILIES
from library.io.places import join
from library.version import VERSION

DAMAGED = 1
_SCRIPT = re.compile(rf"# What ({'|'.join(SCRIPTS)})\.py does")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def fill(chosen: argparse.Namespace) -> int:
    """This encodes all that a run needs, into the cache on disk, and stops."""
    script = SCRIPTS.get(chosen.script) or Script(chosen.script, job="adapter")
    line = _read(script, chosen.options)
    if line.invocation.help:
        about = "Encodes all that the same options would encode before training, into the cache on disk, and stops."
        print(help_text(script.groups, program=f"-m tools.cache fill {script.name}", description=about), end="")
        return 0
    if line.invocation.version:
        print(f"atelier {VERSION}")
        return 0
    config = _configuration(script, line)
    if line.invocation.dry_run:
        print("the options are right; nothing was encoded (--dry_run)")
        return 0
    configure_logging(config.logging)
    stores = {name: StoreCare(join(config.cache_dir, name)) for name in STORES}
    before = {name: store.contents(lambda done: None) for name, store in stores.items()}

    from library.training.upkeep import fill_cache

    filling = fill_cache(config)
    if filling.speaks:
        for name, store in stores.items():
            held = store.contents(lambda done: None)
            added = held.entries - before[name].entries
            seconds = filling.seconds.get(name)
            pace = f" in {seconds:.1f} s, {added / seconds:.1f} per second" if seconds and added else ""
            if held.entries:
                print(f"{store.place}: {added:,} entries added{pace}; it holds {held.entries:,}, {_size(held.bytes)}")
    return 0


def sizes(chosen: argparse.Namespace) -> int:
    """This says what is in a cache."""
    stores = StoreCare.of_cache(chosen.cache)
    held = {}
    for name, store in stores.items():
        with _bar(f"{name}: reading headers", sum(store.shards().values())) as progress:
            held[name] = store.contents(progress)
    held["in all"] = Contents(*map(sum, zip(*held.values())))
    print(f"{'':10}{'entries':>12}{'size':>12}{'shards':>8}")
    for name, (entries, size, shards) in held.items():
        print(f"{name:10}{entries:>12,}{_size(size):>12}{shards:>8,}")
    return 0


def verify(chosen: argparse.Namespace) -> int:
    """This computes every checksum anew, and names or removes what is damaged."""
    damaged = 0
    for name, store in StoreCare.of_cache(chosen.cache).items():
        damages, held = [], sum(store.shards().values())
        with _bar(f"{name}: checking", held) as progress:
            for damage in store.damages(progress):
                damages.append(damage)
                entry = "" if damage.key is None else f"{damage.shard}, entry {damage.key}: "
                tqdm.write(f"{store.place}: {entry}{damage.problem}")
        if damages and chosen.remove:
            with _bar(f"{name}: removing", held) as progress:
                store.remove_damage(damages, progress)
        damaged += len(damages)
    if not damaged:
        print(f"{chosen.cache} is intact")
        return 0
    remedy = "removed; the next run encodes them again" if chosen.remove else "add --remove, and they are encoded again"
    print(f"{damaged:,} damaged entries or shards in {chosen.cache}: {remedy}")
    return DAMAGED


def gc(chosen: argparse.Namespace) -> int:
    """This says what in the caches of some runs none of them uses, or deletes it."""
    runs = [_run_of(path, chosen.family) for path in chosen.runs]

    from library.training.upkeep import used_entries

    used: dict[tuple[str, str], set[str]] = {}
    for config in runs:
        for name, keys in used_entries(config).items():
            used.setdefault((join(config.cache_dir, name), config.local_cache_dir), set()).update(keys)
    freed = 0
    for (place, index_dir), keys in used.items():
        store = StoreCare(place)
        held = sum(store.shards().values())
        with _bar(f"{place}: looking", held) as progress:
            spares = store.spares(keys, progress)
        entries, spare = sum(spare.entries for spare in spares), sum(spare.bytes for spare in spares)
        print(f"{place}: {entries:,} entries that none of these runs uses, {_size(spare)} of {_size(held)}")
        if chosen.delete and spares:
            with _bar(f"{place}: deleting", sum(spare.size for spare in spares)) as progress:
                store.remove_spares(spares, progress, index_dir)
        freed += spare
    print(f"{_size(freed)} deleted" if chosen.delete else f"nothing was changed; --delete frees {_size(freed)}")
    return 0


def _run_of(path: str, family: str | None) -> RunConfig:
    """The run that a file describes."""
    try:
        says = _SCRIPT.match(read_text(Path(path), MOST_TOML_BYTES, kind="a run's TOML"))
    except ConfigError:
        says = None  # reading it as a configuration says what is wrong
    script = SCRIPTS[says[1]] if says else None
    if script is None and family is not None:
        script = SCRIPTS.get(family) or Script(family, job="adapter")
    if script is None:
        if Path(path).is_file():
            raise ConfigError(f"{path} doesn't say its model family; add --family {' or '.join(sorted(FAMILIES))}")
        raise ConfigError(f"{path}: no such file")
    # What the run was resumed from may be gone since
    return _configuration(script, _read(script, ["--config_file", path, "--resume", "", "--no-resume_anyway"]))


def _read(script: Script, options: Sequence[str]) -> CommandLine:
    return read_command_line(script.groups, options, refusals=refused_options(script.family))


def _configuration(script: Script, line: CommandLine) -> RunConfig:
    """The run that the options describe.

    Raises:
        ConfigError: All that is wrong with it, one line each.
    """
    if "config_file" in line.unusable:  # the rest would only say that its options are missing
        raise ConfigError("\n".join(line.problems))
    config, problems = checked_configuration(script, line)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


@contextmanager
def _bar(title: str, size: int) -> Iterator[Progress]:
    """A progress bar of bytes, where somebody looks."""
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, dynamic_ncols=True, disable=None, leave=False) as bar:
        yield lambda done: (bar.update(done), None)[1]


def _size(count: float) -> str:
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:,.1f} {_UNITS[unit]}" if unit else f"{count:,} bytes"


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "fill": fill,
    "sizes": sizes,
    "verify": verify,
    "gc": gc,
}
