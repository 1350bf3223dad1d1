"""Lay the samples of a run side by side: one row per prompt, the first and the last picture of it (or every one).

python tools/sample_grid.py output/sample --output output/before_after.png
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.config.errors import ConfigError

NAME = re.compile(r"(?P<run>.+)_(?P<label>e?\d{6}(?:_raw)?)_(?P<index>\d{2,})_(?:(?P<name>.+)_)?(?P<seed>\d+)\.png")


def arrange(folder: Path, run: str | None, *, every: bool) -> tuple[list[list[Path]], list[str]]:
    """The pictures of one run as rows of paths, and the columns' labels.

    Raises:
        ConfigError: There are none, or several runs and none was chosen.
    """
    matches = [match for path in sorted(folder.glob("*.png")) if (match := NAME.fullmatch(path.name))]
    runs = sorted({match["run"] for match in matches})
    if run is None and len(runs) > 1:
        raise ConfigError(f"{folder} has samples of several runs: {', '.join(runs)}; choose one with --run")
    matches = [match for match in matches if match["run"] == (run or match["run"])]
    if not matches:
        raise ConfigError(f"{folder} has no samples" + (f" of {run}; there are: {', '.join(runs)}" if run else ""))
    rows: dict[str, dict[str, Path]] = {}
    for match in matches:
        rows.setdefault(match["index"], {})[match["label"]] = folder / match.string
    labels = sorted({match["label"] for match in matches}, key=lambda label: (not label.startswith("e"), label))
    if not every:
        labels = [label for label in labels if not label.endswith("_raw")]
        labels = [labels[0], labels[-1]] if len(labels) > 1 else labels
    return [[row[label] for label in labels if label in row] for _, row in sorted(rows.items())], labels


def readable(label: str) -> str:
    """What a sample's label means to people."""
    if label.endswith("_raw"):
        return f"{readable(label.removesuffix('_raw'))}, not averaged"
    if label == "e000000":
        return "before training"
    return f"epoch {int(label[1:])}" if label.startswith("e") else f"step {int(label)}"


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the run's sample folder")
    parser.add_argument("--run", help="the run's --output_name, where the folder has several")
    parser.add_argument("--every", action="store_true", help="every sample instead of the first and the last")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    options = parser.parse_args()
    try:
        rows, labels = arrange(options.folder, options.run, every=options.every)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from PIL import Image

    from library.io.atomic import atomic_path
    from library.sampling.grid import make_grid

    pictures = [[Image.open(path) for path in row] for row in rows]
    captions = [row[0].info.get("parameters", "").split("\n")[0] for row in pictures]
    with atomic_path(options.output) as path:
        make_grid(pictures, captions, [readable(label) for label in labels]).save(path, format="PNG")
    return 0


if __name__ == "__main__":
    sys.exit(main())
