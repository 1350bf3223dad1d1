"""Fuzzes the parsers of files that people download, led by the branches that inputs reach (atheris, libFuzzer).

python -m bench.fuzz [header pickle ...] [--seconds 60] [--crashes crashes] [--json fuzz.json]

Without names, every parser is fuzzed, one after another. Each begins with a few small inputs; an input that makes a
parser fail, take longer than ten seconds or more than two GiB is written to the folder of crashes, where
``python -m bench.fuzz_worker header crashes/header/crash-...`` repeats it. It needs atheris: pip install atheris
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.fuzz_targets import all_targets

ROOT = Path(__file__).resolve().parent.parent
_LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=1024", "-max_len=4096", "-print_final_stats=1")
_EXECUTED = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_NEW = re.compile(r"stat::new_units_added:\s*(\d+)")
_PEAK = re.compile(r"stat::peak_rss_mb:\s*(\d+)")


@dataclass(frozen=True)
class Result:
    """What fuzzing one parser gave.

    Attributes:
        target: The parser.
        executions: Inputs tried.
        found: Inputs that reached something new.
        peak: The most memory, in MiB.
        crashes: Inputs on which it failed.
    """

    target: str
    executions: int
    found: int
    peak: int
    crashes: tuple[str, ...]


def fuzz(name: str, seconds: int, crashes: Path) -> Result:
    """This fuzzes one parser, and stops at the first failure.

    Raises:
        RuntimeError: The process ended without having fuzzed.
    """
    kept = crashes / name
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(all_targets()[name].seeds):
            Path(folder, f"seed-{number}").write_bytes(seed)
        limits = [*_LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={kept}/"]
        command = [sys.executable, "-m", "bench.fuzz_worker", name, *limits, folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    executed = _EXECUTED.search(done.stderr)
    failed = tuple(sorted(str(path) for path in kept.iterdir()))
    failed = tuple(path for path in failed if not path.endswith("log.txt"))
    if executed is None and not failed:
        raise RuntimeError(f"{name} was not fuzzed:\n{done.stderr[-3000:]}")
    if failed:
        (kept / "log.txt").write_text(done.stdout[-20_000:] + done.stderr[-20_000:], encoding="utf-8")
    tried, new, peak = (
        int(match[1]) if (match := what.search(done.stderr)) else 0 for what in (_EXECUTED, _NEW, _PEAK)
    )
    return Result(name, tried, new, peak, failed)


def main() -> int:
    """Run the bench."""
    targets = all_targets()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="*", choices=[*targets, []], help=f"parsers, of {', '.join(targets)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each parser")
    parser.add_argument("--crashes", type=Path, default=Path("crashes"), help="where failing inputs go")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    if find_spec("atheris") is None:
        print("error: bench.fuzz needs the package atheris; pip install atheris", file=sys.stderr)
        return 2
    results = []
    print(f"{'parser':14} {'inputs':>10} {'new':>7} {'MiB':>6} {'failures':>9}")
    for name in options.target or targets:
        result = fuzz(name, options.seconds, options.crashes.resolve())
        failures = len(result.crashes)
        print(f"{name:14} {result.executions:10,} {result.found:7,} {result.peak:6,} {failures:9,}", flush=True)
        results.append(result)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    for path in (path for result in results for path in result.crashes):
        print(path)
    return 1 if any(result.crashes for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
