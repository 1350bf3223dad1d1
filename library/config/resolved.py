"""The resolved configuration: what a run really does, as a TOML that starts the same run again."""

import json
import math
from collections.abc import Iterator
from typing import Any

from library.config.logging import SECRET_VARIABLES
from library.config.options import DEFAULT, Option, option_values
from library.config.run import DERIVED, RunConfig


def resolved_toml(config: RunConfig, *, seed: int | None = None, with_defaults: bool = True) -> str:
    """This writes every option that has a value into a TOML that ``--config_file`` reads back to the same run.

    Defaults stand in comments, so that a later version's defaults are not frozen by accident but can be compared.

    Args:
        config: The configuration.
        seed: The seed that was drawn, when the configuration names none.
        with_defaults: Whether the defaults stand there too.
    """
    lines = [
        f"# What {config.script} does, every option resolved. The same again:",
        f"# python {config.script} --config_file <this file>",
    ]
    section = ""
    for declared, value in option_values(config):
        source = config.provenance[declared.name]
        if declared.name == "seed" and value is None and seed is not None:
            value, source = seed, f"{DERIVED}: drawn for this run"
        is_default = source == DEFAULT and value == declared.default
        if declared.secret and value is not None:
            lines.append(
                f"# {declared.name} was given and is never written; type it again, {_elsewhere(declared.name)}"
            )
        if value is None or declared.secret or (is_default and not with_defaults):
            continue
        if declared.group != section:
            section = declared.group
            lines += ["", f"[{section}]"]
        lines.append(_line(declared, value, source))
    return "\n".join([*lines, *_dataset_lines(config), ""])


def _elsewhere(name: str) -> str:
    """Where a secret may stand instead."""
    variable = SECRET_VARIABLES.get(name)
    return f"or set {variable}" if variable else "or leave it out"


def _line(declared: Option, value: Any, source: str) -> str:
    entry = f"{declared.name} = {toml_value(value)}"
    if value == declared.default:
        return f"{entry}  # {source}" if source != DEFAULT else f"# {entry}  # {DEFAULT}"
    return f"{entry}  # {source if source != DEFAULT else f'{DERIVED} from other options'}"


def _dataset_lines(config: RunConfig) -> Iterator[str]:
    """The datasets as they were understood, in comments: their own file is what a second run reads."""
    for index, dataset in enumerate(config.datasets):
        yield ""
        yield f"# datasets[{index}]: {dataset.resolution}, batches of {dataset.batch_size}"
        for number, subset in enumerate(dataset.subsets):
            kind = "regularisation pictures" if subset.is_reg else "pictures"
            beside = "control pictures" if config.control_net is not None else "masks"
            folder = subset.conditioning_data_dir
            also = f", {beside} in {json.dumps(folder)}" if folder is not None else ""
            yield (
                f"#   subsets[{number}]: {kind} in {json.dumps(subset.image_dir)}{also}, num_repeats "
                f"{subset.num_repeats}"
            )


def toml_value(value: Any) -> str:
    """This writes a value as TOML does."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    # A JSON string is a TOML string, but for DEL, which TOML wants escaped
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
