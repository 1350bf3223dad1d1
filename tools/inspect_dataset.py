"""Show what a dataset TOML makes of the pictures, as one HTML page: crops, masks, captions as they are read, warnings.

python -m tools.inspect_dataset sd3 --dataset_config dataset.toml --output dataset.html

It takes every option of the family's training script too, so the command of a run can be used as it is.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from library.cli import INTERRUPTED, SCRIPTS, WRONG_USAGE, Script, print_errors, refused_options
from library.config.command_line import CommandLine, help_text, read_command_line
from library.config.dataset import read_datasets
from library.config.errors import ConfigError
from library.config.options import option
from library.config.run import RunConfig, make_run_config
from library.dry_run import DataScan, scan_data
from library.families import FAMILIES, family_files, family_options, family_tokenizers
from library.io.atomic import write_text
from library.version import VERSION

_RELEVANT = ("inspection", "data", "pictures", "captions", "caching", "model", "family", "training")
_PROGRAM = "tools/inspect_dataset.py"


@dataclass(frozen=True, kw_only=True)
class InspectionConfig:
    """The page."""

    output: str | None = option(None, "The HTML file to write. There is no default.", metavar="FILE.html")
    pictures: int = option(
        200,
        "Pictures that are shown per dataset: first those that there is a warning about, then some of every size.",
        minimum=1,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """This writes the page.

    Args:
        argv: The family and the options; by default the process's own.

    Returns:
        The exit code: 0, 2 for what the user can fix, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except ConfigError as error:
        print_errors(str(error).splitlines())
        return WRONG_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: Sequence[str]) -> int:
    named = arguments[0] if arguments else ""
    known = named in SCRIPTS or named in FAMILIES
    family = named if named in FAMILIES else next(iter(FAMILIES))
    script = SCRIPTS.get(named) or Script(family, job="adapter")
    groups = {"inspection": InspectionConfig, **script.groups}
    command_line = read_command_line(groups, arguments[known:], refusals=refused_options(script.family))
    if command_line.invocation.help:
        relevant = {name: group for name, group in groups.items() if name in _RELEVANT}
        about = f"{__doc__ or ''} The first word is the model family or the script: {', '.join((*FAMILIES, *SCRIPTS))}."
        print(help_text(relevant, program=f"{_PROGRAM} {named if known else family}", description=about), end="")
        return 0
    if command_line.invocation.version:
        print(f"atelier {VERSION}")
        return 0
    if not known:
        raise ConfigError(f"the first word is the model family ({', '.join(FAMILIES)}), not {named or 'nothing'}")
    config = _configuration(script.family, command_line)
    output, title = command_line.groups["inspection"].output, _title(config)
    with _progress() as (say, progress):
        say("looking at the pictures")
        scan, windows, notes = _scan(config, progress)
        say("making thumbnails")
        page, shown = _page(config, title, scan, windows, command_line.groups["inspection"].pictures, progress)
    try:
        write_text(output, page)
    except OSError as error:
        raise ConfigError(f"--output {output}: can't be written ({error.strerror})") from None
    for remark in scan.report.remarks:
        print(f"warning: {remark.text}")
    for note in notes:
        print(f"note: {note}")
    print(f"{output}: {shown:,} of {len(scan.discovery.samples) + len(scan.discovery.validation):,} pictures")
    return 0


def _configuration(family: str, command_line: CommandLine) -> RunConfig:
    """The run that the options describe; only its data must be in order.

    Raises:
        ConfigError: All that is wrong, one line each.
    """
    problems = list(command_line.problems)
    groups = {name: group for name, group in command_line.groups.items() if name != "inspection"}
    datasets: Any = ()
    try:
        step = family_options(family).RESOLUTION_STEP
        datasets = read_datasets(groups["data"], groups["pictures"], groups["captions"], resolution_step=step)
    except ConfigError as error:
        problems += str(error).splitlines()
    if command_line.groups["inspection"].output is None and "output" not in command_line.unusable:
        problems.append("--output is missing: name the HTML file to write, such as dataset.html")
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return make_run_config(family, _PROGRAM, groups, command_line.provenance, datasets)


def _title(config: RunConfig) -> str:
    data = config.data
    return os.path.basename(str(data.dataset_config or data.in_json or data.train_data_dir).rstrip("/"))


def _scan(config: RunConfig, progress: Callable[[int, int], None]) -> tuple[DataScan, Mapping[str, Any], list[str]]:
    """The data, the tokenizers, and what isn't shown and why."""
    model, files, description = config.model, None, None
    if model.pretrained_model_name_or_path is not None:
        module = family_files(config.family_name)
        files = module.locate(model, config.family)
        description = module.describe(files, config.family)
    windows: Mapping[str, Any] = {}
    notes = []
    if files is not None or model.tokenizer_dir is not None or model.tokenizer_cache_dir is not None:
        try:
            windows = family_tokenizers(config.family_name).find_windows(model, config.family, files)
        except ConfigError as error:
            if model.tokenizer_dir is not None:
                raise
            notes.append(f"captions are shown whole: {error}")
    scan = scan_data(config, description, windows, skip_bad_images=True, progress=progress)
    return scan, windows, notes


def _page(
    config: RunConfig,
    title: str,
    scan: DataScan,
    windows: Mapping[str, Any],
    most: int,
    progress: Callable[[int, int], None],
) -> tuple[str, int]:
    """The page, and how many pictures it shows."""
    from tools.inspection.cards import make_shelves
    from tools.inspection.page import render
    from tools.inspection.thumbnails import make_thumbnails

    discovery = scan.discovery
    trained = list(zip(discovery.samples, scan.placements))
    held_out = list(zip(discovery.validation, scan.validation_placements))
    duplicates = (*discovery.duplicates, *discovery.near_duplicates)
    shelves = make_shelves(
        scan.report,
        config.datasets,
        trained,
        held_out,
        duplicates,
        windows,
        seed=scan.seed,
        variants=config.caching.caption_variants,
        most=most,
    )
    cards = [card for shelf in shelves for card in shelf.cards]
    wanted = [
        (card.sample, card.masked, config.datasets[card.sample.dataset].subsets[card.sample.subset].alpha_color)
        for card in cards
    ]
    thumbnails = dict(zip((card.sample.key for card in cards), make_thumbnails(wanted, progress)))
    pictures = Counter((sample.dataset, sample.subset) for sample, _ in (*trained, *held_out))
    family = family_options(config.family_name).TITLE
    page = render(title, family, scan.report, pictures, shelves, thumbnails)
    return page, len(cards)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """A bar on the terminal: what is being done, and how far it is."""
    from tqdm import tqdm

    with tqdm(unit="img", dynamic_ncols=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield bar.set_description, progress


if __name__ == "__main__":
    sys.exit(main())
