"""Check that your own configuration resumes exactly on this machine: 2k steps without a stop, against k steps, a stop,
and the other k from the saved state. Says "equal" (exit code 0), or names what differs (1).

python tools/verify_resume.py sd3_train_network.py --steps 10 -- --config_file my_cat.toml
python tools/verify_resume.py sana_train.py --launch "accelerate launch --num_processes 2" -- --config_file my_cat.toml
"""

import argparse
import contextlib
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from library.cli import INTERRUPTED, SCRIPTS, WRONG_USAGE, checked_configuration, print_errors, refused_options
from library.config.command_line import read_command_line
from library.config.errors import ConfigError
from library.config.run import RunConfig

ROOT = Path(__file__).resolve().parent.parent
NOT_EQUAL = 1


def main(argv: Sequence[str] | None = None) -> int:
    """This runs the check.

    Args:
        argv: The arguments after the program's name; by default the process's own.

    Returns:
        The exit code: 0 equal, 1 not equal, 2 for what the user can fix, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    own, options = _split(words)
    chosen = _parser().parse_args(own)
    try:
        more = options_of_the_check(chosen.script, options)
        with _folder(chosen.folder, keep=chosen.keep) as folder:
            return _check(chosen, options + more, folder)
    except ConfigError as error:
        print_errors(str(error).splitlines())
        for line in getattr(error, "said", ()):
            print(f"  {line}", file=sys.stderr)
        return WRONG_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def options_of_the_check(script: str, options: Sequence[str]) -> list[str]:
    """What the check adds to the user's options, so that its runs draw the same and share a cache.

    Raises:
        ConfigError: With these options there is nothing to check, or training would refuse them.
    """
    from library.training.verifying import REFUSED

    named = SCRIPTS[Path(script).stem]
    line = read_command_line(named.groups, options, refusals=refused_options(named.family))
    config, problems = checked_configuration(named, line)
    given = {name: value for name, value in config.as_dict().items() if name in REFUSED and value}
    problems += [f"--{name} {given[name]}: {REFUSED[name]}; leave it out" for name in given]
    if problems:
        raise ConfigError("\n".join(problems))
    return _additions(config)


def _additions(config: RunConfig) -> list[str]:
    added = [] if config.training.seed is not None else ["--seed", "0"]
    on_disk = config.caching.cache_latents_to_disk or config.caching.cache_text_encoder_outputs_to_disk
    if on_disk and not config.was_given("cache_dir"):
        added += ["--cache_dir", "{folder}/cache"]
    return added


def _check(chosen: argparse.Namespace, options: Sequence[str], folder: Path) -> int:
    from library.training.verifying import Check, verdict, verify_resume

    launch = shlex.split(chosen.launch) if chosen.launch else [sys.executable]
    check = Check(
        command=[*launch, str(ROOT / f"{Path(chosen.script).stem}.py")],
        options=[option.replace("{folder}", str(folder)) for option in options],
        steps=chosen.steps,
        folder=folder,
    )
    comparison = verify_resume(check, lambda said: print(said, flush=True))
    print("\n".join(verdict(comparison, check)))
    if chosen.keep:
        print(f"kept: {folder}")
    return NOT_EQUAL if comparison.differences else 0


@contextlib.contextmanager
def _folder(chosen: Path | None, *, keep: bool) -> Iterator[Path]:
    """Where the runs write; afterwards it is deleted, unless it is to be kept."""
    if chosen is not None:
        try:
            chosen.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--folder {chosen}: can't be made ({error.strerror})") from None
    if keep:
        yield Path(tempfile.mkdtemp(prefix="verify_resume_", dir=chosen)).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="verify_resume_", dir=chosen) as folder:
        yield Path(folder).resolve()


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tool's own arguments, and the training's after ``--``."""
    place = words.index("--") if "--" in words else len(words)
    return list(words[:place]), list(words[place + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python tools/verify_resume.py SCRIPT [--steps K] [--launch COMMAND] [--folder FOLDER] [--keep] -- "
        "--training_option value ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "script", type=_script, metavar="SCRIPT", help=f"The training script: {', '.join(sorted(SCRIPTS))}."
    )
    parser.add_argument(
        "--steps",
        type=_count,
        default=10,
        metavar="K",
        help="Stop after so many optimizer steps; default: %(default)s.",
    )
    parser.add_argument(
        "--launch",
        metavar="COMMAND",
        help='How you start the script, such as "accelerate launch --num_processes 2". Default: this Python.',
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="Where a folder for the runs' outputs is made; by default among the system's temporary files. It needs "
        "room for two results and four states.",
    )
    parser.add_argument("--keep", action="store_true", help="Keep that folder. By default it is deleted.")
    return parser


def _script(text: str) -> str:
    if Path(text).stem not in SCRIPTS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(sorted(SCRIPTS))}, got {text!r}")
    return text


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
