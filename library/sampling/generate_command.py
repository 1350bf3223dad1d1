"""What generate.py does: options to a checked list of pictures, then the pictures. Nothing loads before the check."""

import dataclasses
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.command_line import CommandLine, help_text, read_command_line
from library.config.ddpm import ddpm_problems
from library.config.errors import ConfigError
from library.config.generate import GenerateConfig
from library.config.memory import MemoryConfig, encoder_problems
from library.config.model import ModelConfig
from library.config.model_defaults import stated_problems
from library.config.options import DEFAULT, Option, options_of
from library.config.paths import folder_problem
from library.config.sampling import binning_table, skip_layer_problems
from library.families import FAMILIES, family_files, family_options
from library.io.base_model import denoiser_architecture
from library.records import ModelDescription
from library.sampling.prompt_files import read_entries
from library.sampling.prompts import PromptRequest, SizeRules, make_requests
from library.sampling.requests import check_previews, typed_prompts
from library.version import VERSION

WRONG_USAGE, INTERRUPTED = 2, 130


@dataclass(frozen=True, kw_only=True)
class GenerateRun:
    """What a run of generate.py does; a family is created from it.

    Attributes:
        family_name: In the registry.
        description: What the files said about the model.
        requests: The pictures, in order.
        model: Where the base model lies.
        family: The family's own options.
        generate: Adapters, precision, device, output.
        memory: The attention, and how text encoders are stored.
        guesses: What was guessed about the model, one sentence each.
        flow: Defaults; nothing is trained.
        ddpm: What the model answers with, and its schedule; the rest are defaults.
        loss: Defaults; nothing is trained.
    """

    family_name: str
    description: ModelDescription
    requests: tuple[PromptRequest, ...]
    model: ModelConfig
    family: Any
    generate: GenerateConfig
    memory: MemoryConfig
    guesses: tuple[str, ...] = ()
    flow: Any = None
    ddpm: Any = None
    loss: Any = None


def main(argv: Sequence[str] | None = None) -> int:
    """This parses, checks everything, then makes the pictures.

    Args:
        argv: The arguments after the script's name; by default the process's own.

    Returns:
        The exit code: 0, 2 for what the user can fix, 130 after Ctrl-C.
    """
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except ConfigError as error:
        for problem in str(error).splitlines():
            print(f"error: {problem}", file=sys.stderr)
        return WRONG_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    groups: dict[str, type] = {"model": ModelConfig, "generate": GenerateConfig}
    known = read_command_line(groups, argv)  # to find the family; its options are unknown words as yet
    name = _family_name(known)
    options = family_options(name)
    groups = {"model": ModelConfig, "family": options.OPTIONS, **options.GENERATE_GROUPS}
    if known.invocation.help:
        description = f"Pictures from prompts: the base model, with or without adapters ({options.TITLE})."
        print(help_text(groups, program="generate.py", description=description), end="")
        return 0
    if known.invocation.version:
        print(f"atelier {VERSION}")
        return 0
    command_line = read_command_line(groups, argv)
    run = checked_run(name, command_line)
    if command_line.invocation.dry_run:
        print(f"model: {run.description.title}")
        for guess in run.guesses:
            print(f"warning: {guess}")
        for request in run.requests:
            print(dataclasses.asdict(request))
        print("nothing was loaded or written (--dry_run)")
        return 0

    from library.sampling.generation import make_pictures

    make_pictures(run)
    return 0


def checked_run(family_name: str, command_line: CommandLine) -> GenerateRun:
    """This joins what was parsed, and checks all that needs no weights.

    Raises:
        ConfigError: All that is wrong, one line each.
    """
    groups, options = command_line.groups, family_options(family_name)
    model, family, generate = groups["model"], groups["family"], groups["generate"]
    problems = list(command_line.problems)
    problems += [
        f"--{name} does nothing here: it acts in training only. Remove it"
        for name in options.TRAINING_ONLY
        if command_line.provenance[name] != DEFAULT
    ]
    if not problems:
        if not generate.prompt and generate.sample_prompts is None:
            problems.append(
                '--prompt is missing; say what to show, --prompt "a photo of a cat", or add --sample_prompts'
            )
        problems += family_files(family_name).problems(model, family)
        for path in generate.network_weights:
            if not Path(path).is_file():
                problems.append(f"--network_weights {path}: no such file")
        if problem := folder_problem(generate.output_dir):
            problems.append(f"--output_dir {generate.output_dir}: {problem}")
    if problems:
        raise ConfigError("\n".join(problems))
    files = family_files(family_name)
    description = files.describe(files.locate(model, family), family)
    memory = MemoryConfig(
        attn_mode=generate.attn_mode,
        sdpa=generate.sdpa,
        xformers=generate.xformers,
        text_encoder_1_precision=generate.text_encoder_1_precision,
        text_encoder_2_precision=generate.text_encoder_2_precision,
        text_encoder_3_precision=generate.text_encoder_3_precision,
    )
    objective = objective_groups(options, command_line, description)
    said = [(declared, value) for group in groups.values() for declared, value in values_of(group)]
    wrong = [
        *stated_problems(said, description),
        *(ddpm_problems(objective["ddpm"]) if "ddpm" in objective else ()),
        *skip_layer_problems(generate, description),
        *encoder_problems(memory, description.text_encoders),
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return GenerateRun(
        family_name=family_name,
        description=description,
        requests=picture_requests(generate, description, options.RESOLUTION_STEP),
        model=model,
        family=family,
        generate=generate,
        memory=memory,
        guesses=tuple(
            told for name, told in description.unsure.items() if command_line.provenance.get(name, DEFAULT) == DEFAULT
        ),
        **objective,
    )


def objective_groups(options: Any, command_line: CommandLine, description: ModelDescription) -> dict[str, Any]:
    """The family's groups of training's objective: what generate.py can be told of them, and defaults for the rest.

    Args:
        options: The family's ``options`` module.
        command_line: What was said.
        description: What acts where nobody said it.
    """
    made = {}
    for attribute, group in options.OBJECTIVE_GROUPS.items():
        told = values_of(command_line.groups[attribute]) if attribute in command_line.groups else ()
        values = {declared.name: value for declared, value in told}
        unsaid = {name: own for name, own in description.defaults.items() if name in values and values[name] is None}
        made[attribute] = group(**values | unsaid)
    return made


def values_of(group: Any) -> Iterator[tuple[Option, Any]]:
    """The options of a group with their values."""
    kind: type = type(group)
    return ((declared, getattr(group, declared.name)) for declared in options_of(kind))


def picture_requests(
    generate: GenerateConfig, description: ModelDescription, resolution_step: int
) -> tuple[PromptRequest, ...]:
    """This lists every picture: the prompts of the command line, then those of the file, each so often as was asked.

    Args:
        generate: The options.
        description: What acts where nothing is said, and the sizes that the model makes.
        resolution_step: Both sides must be multiples of this many pixels.

    Raises:
        ConfigError: A size can't be made, the prompt file is wrong, or an option does nothing here.
    """
    own = description.sampling
    sizes = SizeRules(
        native=description.native_resolution,
        step=resolution_step,
        largest_side=description.largest_side,
        table=binning_table(generate, description),
    )
    fallbacks: dict[str, Any] = {
        "negative_prompt": generate.negative_prompt,
        "steps": generate.steps or own.steps,
        "scale": own.scale if generate.scale is None else generate.scale,
        "sampler": generate.sampler or own.sampler,
        "seed": secrets.randbelow(2**32) if generate.seed is None else generate.seed,
    }
    for side in ("width", "height"):
        if (value := getattr(generate, side)) is not None:
            sizes.check(f"--{side}", value)
            fallbacks[side] = value
    entries = typed_prompts("prompt", generate.prompt)
    if generate.sample_prompts is not None:
        entries += read_entries(generate.sample_prompts)
    requests = make_requests(entries, sizes, seed=fallbacks["seed"], samplers=own.samplers, fallbacks=fallbacks)
    check_previews(generate.preview_every, requests)
    return tuple(
        dataclasses.replace(request, seed=request.seed + number)
        for request in requests
        for number in range(generate.images_per_prompt)
    )


def _family_name(known: CommandLine) -> str:
    """The family that was named, or that the base model's tensor names belong to.

    What isn't recognised is left to the first family's checks, which say what the file is.
    """
    named, path = known.groups["generate"].family, known.groups["model"].pretrained_model_name_or_path
    if named is not None and named not in FAMILIES:
        raise ConfigError(f"--family: expected one of {', '.join(FAMILIES)}, got {named!r}")
    if named is not None or path is None:
        return named or next(iter(FAMILIES))
    found = denoiser_architecture(Path(path))
    return found.family if found is not None and found.family else next(iter(FAMILIES))
