"""The data side by itself: start-up, caching and reading of cached samples.

python -m bench.data [--part startup|caching|loader] [--counts 1000 10000 100000] [--folder DIR] [--json data.json]

Start-up: generated folders of small JPEGs and captions, scanned, read, placed and planned in a fresh process, cold
(nothing is remembered) and warm. Caching: pictures through a VAE of SD3's kind, a quarter as wide, against the VAE
alone. Loader: samples at the sizes of SD3.5 at 1024 px from a packed store, against plain reads of the same bytes; with
the noise that each sample gets, whose drawing takes most of the time, and without.
Everything lies in a temporary folder and is deleted.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.generated_pictures import make_folder

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="pictures at start-up")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; by default the system's")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for part in options.part:
            rows = found[part] = []
            for row in PARTS[part](Path(temporary), options.counts):
                if not rows:
                    print(f"\n{part}\n" + "  ".join(f"{name:>16}" for name in row))
                print("  ".join(f"{_shown(value):>16}" for value in row.values()), flush=True)
                rows.append(row)
    if options.json:
        facts = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        options.json.write_text(json.dumps({**facts, **found}, indent=1))


def startup(folder: Path, counts: list[int]) -> Iterator[Row]:
    """Scan, sizes, captions, buckets and plan, cold and warm, in processes of their own."""
    for count in counts:
        pictures = make_folder(folder / f"pictures_{count}", count)
        index = folder / f"files_{count}.sqlite"
        command = [sys.executable, "-m", "bench.data_startup", str(pictures), str(index)]
        for kind in ("cold", "warm"):
            answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            times = json.loads(answer.splitlines()[-1])
            named = {f"{name} s": times[name] for name in ("discovery", "buckets", "plan", "total")}
            yield {"pictures": count, "start": kind, **named, "MB": times["memory"] / 1e6}


def caching(folder: Path, counts: list[int]) -> Iterator[Row]:
    """Pictures per second through the caching pass, against the VAE alone."""
    from bench.data_caching import PictureFolder

    for side, pictures in ((256, 24), (512, 8)):
        encoder = PictureFolder(folder, side, pictures)
        alone, through = _best(encoder.vae_seconds), _best(encoder.cached_seconds)
        yield {
            "pictures": pictures,
            "side px": side,
            "VAE alone /s": pictures / alone,
            "cached /s": pictures / through,
            "added %": 100 * (through / alone - 1),
        }


def loader(folder: Path, counts: list[int]) -> Iterator[Row]:
    """Cached samples per second, against plain reads of the same bytes."""
    from bench.data_loader import fill_stores, loader_seconds, plain_seconds

    samples = 600
    stores = fill_stores(folder / "stores", samples)
    plain = _best(lambda: plain_seconds(stores))
    size = stores.bytes / samples
    yield {
        "reader": "plain read",
        "workers": 0,
        "samples/s": samples / plain,
        "MB/s": size * samples / plain / 1e6,
        "of plain %": 100.0,
    }
    for workers, noise in itertools.product((0, 2, 4), (True, False)):
        seconds = _best(partial(loader_seconds, stores, workers, noise=noise))
        yield {
            "reader": "loader" if noise else "without noise",
            "workers": workers,
            "samples/s": samples / seconds,
            "MB/s": size * samples / seconds / 1e6,
            "of plain %": 100 * plain / seconds,
        }


PARTS: dict[str, Callable[[Path, list[int]], Iterator[Row]]] = {
    "startup": startup,
    "caching": caching,
    "loader": loader,
}


def _best(measure: Callable[[], float], repeats: int = 3) -> float:
    return min(measure() for _ in range(repeats))


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
