"""Look after the cache of latents, masks and text features.

python -m tools.cache fill sd3 --config_file run.toml    encode all that a run needs, and stop
python -m tools.cache sizes outputs/cache                what is in a cache
python -m tools.cache verify outputs/cache               whether it is as it was written
python -m tools.cache gc outputs/*-run.toml              what none of these runs uses; --delete makes the room
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from library.cli import INTERRUPTED, SCRIPTS, WRONG_USAGE, print_errors
from library.config.errors import ConfigError
from library.families import FAMILIES


def main(arguments: Sequence[str] | None = None) -> int:
    """This does what the command line asks for.

    Args:
        arguments: Those after the program's name; by default the process's own.

    Returns:
        The exit code: 0, 1 when ``verify`` found damage, 2 for what the user can fix, 130 after Ctrl-C.
    """
    chosen = _parser().parse_args(arguments)
    try:
        from tools.cache_commands import COMMANDS

        return COMMANDS[chosen.command](chosen)
    except ConfigError as error:
        print_errors(str(error).splitlines())
        return WRONG_USAGE
    except KeyboardInterrupt:
        print("interrupted; what was done so far is kept", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fill = commands.add_parser(
        "fill",
        help="Encode all that a run needs, and stop.",
        usage="python -m tools.cache fill SCRIPT --option value ...",
    )
    fill.add_argument(
        "script",
        choices=sorted({*FAMILIES, *SCRIPTS}),
        metavar="SCRIPT",
        help="The training script, or the model family, which stands for its adapters: %(choices)s.",
    )
    fill.add_argument("options", nargs=argparse.REMAINDER, help="The options of its training script.")
    sizes = commands.add_parser("sizes", help="Say what is in a cache.")
    verify = commands.add_parser("verify", help="Compute every checksum anew, and name what is damaged.")
    verify.add_argument("--remove", action="store_true", help="Remove what is damaged, so that it is encoded again.")
    for command in (sizes, verify):
        command.add_argument("cache", metavar="DIR", help="The --cache_dir of a run: a folder, or a URL.")
    gc = commands.add_parser("gc", help="Say what in a cache no run uses, or delete it.")
    gc.add_argument(
        "runs",
        nargs="+",
        metavar="RUN.toml",
        help="Configurations of all runs that shall go on using their cache: what training wrote beside its output "
        "(<output_name>-run.toml), or files for --config_file.",
    )
    gc.add_argument(
        "--family",
        choices=sorted({*FAMILIES, *SCRIPTS}),
        help="The training script, or the family, of configurations that training didn't write.",
    )
    gc.add_argument("--delete", action="store_true", help="Delete it. By default nothing is changed.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
