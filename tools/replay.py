"""Do one optimizer step again, from the replay bundle that a run wrote, and say where its numbers stop being finite.

python tools/replay.py output/my_cat-nonfinite-step00000012
python tools/replay.py output/my_cat-replay-step00000100 --pretrained_model_name_or_path models/sd3.5_medium.safetensors

Options of the training script may follow; they win over those of the run.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from library.cli import INTERRUPTED, SCRIPTS, WRONG_USAGE, configure_logging, print_errors, refused_options
from library.config.command_line import read_command_line
from library.config.errors import ConfigError
from library.config.run import RunConfig, make_run_config
from library.families import family_files

if TYPE_CHECKING:
    from library.training.bundle import Bundle, StepNumbers
    from library.training.replay import Replay

DIFFERS = 1
_SHOWN = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """This does the step again and prints what came out.

    Args:
        arguments: Those after the program's name; by default the process's own.

    Returns:
        The exit code: 0 when the numbers are those that the run had, 1 when they aren't, 2 for what the user can fix.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder")
    chosen, options = parser.parse_known_args(arguments)
    try:
        return _replay(chosen.bundle, options)
    except ConfigError as error:
        print_errors(str(error).splitlines())
        return WRONG_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def configuration(bundle: "Bundle", options: Sequence[str]) -> RunConfig:
    """The run's options without its data, which the bundle has.

    Args:
        bundle: The bundle.
        options: More of them, as typed.

    Raises:
        ConfigError: All that is wrong with them, one line each.
    """
    name = str(bundle.facts["script"]).removesuffix(".py")
    if name not in SCRIPTS:
        raise ConfigError(f"{bundle.folder}: made by {name}, which this version doesn't have")
    script = SCRIPTS[name]
    words = ["--config_file", str(bundle.settings), *options]
    line = read_command_line(script.groups, words, refusals=refused_options(script.family))
    if line.problems:
        raise ConfigError("\n".join(line.problems))
    config = make_run_config(script.family, f"{script.name}.py", line.groups, line.provenance, ())
    files = family_files(script.family)
    return config.with_model_defaults(files.describe(files.locate(config.model, config.family), config.family))


def _replay(folder: Path, options: Sequence[str]) -> int:
    from library.training.bundle import read_bundle

    bundle = read_bundle(folder)
    config = configuration(bundle, options)
    configure_logging(config.logging)

    from library.training.replay import agrees, replay

    result = replay(bundle, config)
    print("\n".join(report(bundle, result)))
    same = agrees(bundle, result.numbers)
    if same:
        rounding = "" if bundle.facts["same_sums"] else " (up to rounding: its sums had another order)"
        print(f"reproduced: {_shown(result.numbers)}, as recorded{rounding}")
        return 0
    print(f"differs: recorded {_shown(bundle.numbers)}, now {_shown(result.numbers)}")
    for line in reasons(bundle):
        print(line)
    return DIFFERS


def report(bundle: "Bundle", result: "Replay") -> Iterator[str]:
    """What the step showed, line by line."""
    facts = bundle.facts
    processes = facts["processes"]
    yield (
        f"step {facts['step']} of {facts['script']}, seed {facts['seed']}: {facts['step_samples']} samples in "
        f"{sum(len(part['batches']) for part in processes)} micro-batches of {len(processes)} processes"
    )
    yield "losses of the samples, before they are weighted:"
    for process, key, loss in result.per_sample:
        yield f"  {loss:<12.6g} {key}" + (f" (process {process})" if len(processes) > 1 else "")
    for title, found in (
        ("trained weights that were not finite before the step", result.bad_weights),
        ("parts of the batches that are not finite", result.bad_inputs),
        ("first layer whose output is not finite", [result.first_layer] if result.first_layer else []),
        ("first parameters whose gradients are not finite", result.bad_gradients),
    ):
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        yield f"{title}: {', '.join(found[:_SHOWN]) or 'none'}{more}"


def reasons(bundle: "Bundle") -> Iterator[str]:
    """Why the numbers may differ, line by line."""
    import torch

    from library.version import VERSION

    facts = bundle.facts
    if not facts["weights_are_of_before"]:
        yield "with --fused_backward_pass some weights had stepped when the gradient was found: this can't be the same"
    for name, now in (("torch", torch.__version__), ("atelier", VERSION)):
        if facts["versions"][name] != now:
            yield f"the run had {name} {facts['versions'][name]}, here is {now}"
    yield f"the run's device: {facts['processes'][0]['device']}"


def _shown(numbers: "StepNumbers") -> str:
    norm = "" if numbers.gradient_norm is None else f", gradient norm {numbers.gradient_norm!r}"
    return f"loss {numbers.loss!r}{norm}"


if __name__ == "__main__":
    sys.exit(main())
