"""Options of pictures made while training."""

import re
from dataclasses import dataclass
from typing import Any

from library.config.errors import ConfigError
from library.config.options import option
from library.config.samplers import SAMPLERS, parse_sampler
from library.records import ModelDescription, Resolution, SamplingDefaults


@dataclass(frozen=True)
class SkipLayerGuidance:
    """Guidance away from what the denoiser would answer with some of its blocks left out.

    Attributes:
        layers: Indices of the blocks that are left out.
        scale: Factor of (answer - answer with blocks left out).
        start: Fraction of the steps after which it acts.
        stop: Fraction of the steps from which on it no longer acts.
    """

    layers: tuple[int, ...]
    scale: float
    start: float
    stop: float

    @classmethod
    def of(cls, options: Any) -> "SkipLayerGuidance | None":
        """What the ``validation_guidance_skip_*`` options of a group ask for; None when no layers are named.

        Raises:
            ConfigError: The options contradict each other, or act on nothing.
        """
        layers = tuple(options.validation_guidance_skip_layers)
        for name in ("layers_start", "layers_stop", "scale"):
            option_name = f"validation_guidance_skip_{name}"
            value = getattr(options, option_name)
            if value != type(options).__dataclass_fields__[option_name].default and not layers:
                raise ConfigError(f"--{option_name} {value} does nothing without --validation_guidance_skip_layers")
        if any(layer < 0 for layer in layers) or len(set(layers)) != len(layers):
            raise ConfigError(
                f"--validation_guidance_skip_layers {' '.join(map(str, layers))} must be different block numbers "
                "from 0 on"
            )
        start, stop = options.validation_guidance_skip_layers_start, options.validation_guidance_skip_layers_stop
        if not 0 <= start < stop <= 1:
            raise ConfigError(
                f"--validation_guidance_skip_layers_start {start} must be below "
                f"--validation_guidance_skip_layers_stop {stop}, both from 0 to 1"
            )
        return cls(layers, options.validation_guidance_skip_scale, start, stop) if layers else None

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in step number ``step`` (from 0) of ``steps``."""
        return self.start * steps < step < self.stop * steps


def skip_layer_problems(options: Any, description: ModelDescription) -> list[str]:
    """What the ``validation_guidance_skip_*`` options of a group ask of a model that can't do it.

    Args:
        options: The group.
        description: The model.
    """
    skip = SkipLayerGuidance.of(options)
    if skip is None:
        return []
    if description.unskippable:
        return [
            f"--validation_guidance_skip_layers does nothing for {description.title}: {description.unskippable}. "
            "Remove it"
        ]
    if max(skip.layers) < description.blocks:
        return []
    return [
        f"--validation_guidance_skip_layers {max(skip.layers)}: the denoiser has blocks 0 to {description.blocks - 1}"
    ]


def sampling_defaults(own: SamplingDefaults) -> dict[str, Any]:
    """What a model gives the options of ``SamplingConfig`` that nobody gave: option -> value.

    Args:
        own: The model's.
    """
    defaults: dict[str, Any] = {
        "sample_sampler": own.sampler,
        "validation_num_inference_steps": own.steps,
        "validation_guidance": own.scale,
    }
    return defaults | ({"use_resolution_binning": True} if own.table else {})


def binning_table(options: Any, description: ModelDescription) -> str | None:
    """The table of sizes that pictures are computed at; None: they are computed at the size that was asked for.

    Args:
        options: A group with ``use_resolution_binning``.
        description: The model.

    Raises:
        ConfigError: The option was given for a model without a table.
    """
    wanted, table = options.use_resolution_binning, description.sampling.table
    if table is None and wanted is not None:
        raise ConfigError(
            f"--{'' if wanted else 'no-'}use_resolution_binning does nothing for {description.title}: it has no table "
            "of sizes that it was trained at, and computes every picture at its own size. Remove it"
        )
    return None if wanted is False else table


_SIZE = re.compile(r"(\d+)(?:x(\d+))?")


def parse_sizes(value: Any) -> str:
    """This tidies sizes, width first, as in ``1024x1024,1280x768``; a single number is a square.

    Raises:
        ValueError: It is something else, or a size stands twice.
    """
    words = value if isinstance(value, list) else str(value).split(",")
    matches = [_SIZE.fullmatch(str(word).strip()) for word in words]
    found = [f"{match[1]}x{match[2] or match[1]}" for match in matches if match is not None]
    if not found or len(found) < len(words) or any("0" in size.split("x") for size in found):
        raise ValueError(f"expected sizes such as 1024x1024,1280x768 (width x height), got {value!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"{value!r} names a size twice; keep one")
    return ",".join(found)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sample pictures while training."""

    sample_prompts: str | None = option(
        None,
        "File of prompts (.txt, .toml or .json) to make pictures of while training, in <output_dir>/sample. A .json "
        "may be a library of names and prompts. By default none are made.",
        metavar="FILE",
        aliases=("user_prompt_library",),
    )
    validation_prompt: tuple[str, ...] = option(
        (),
        "One or more prompts, each in quotes, to make sample pictures of before those of --sample_prompts. Options "
        "inside such a prompt are text.",
    )
    sample_every_n_steps: int | None = option(
        None, "Makes sample pictures every N optimizer steps.", minimum=1, metavar="N"
    )
    sample_every_n_epochs: int | None = option(
        None, "Makes sample pictures at the end of every Nth epoch.", minimum=1, metavar="N"
    )
    sample_at_first: bool = option(False, "Makes sample pictures before the first step too.")
    sample_sampler: str | None = option(
        None,
        "Sampler of sample pictures, where the prompt names none. By default the model's own.",
        choices=SAMPLERS,
        parse=parse_sampler,
    )
    validation_num_inference_steps: int | None = option(
        None,
        "Steps of sample pictures, where the prompt names none. By default the model's own: 28 for SD3, 20 for Sana, "
        "30 for Stable Diffusion 1.x and 2.x.",
        minimum=1,
        maximum=1000,
        metavar="STEPS",
    )
    validation_guidance: float | None = option(
        None,
        "Classifier-free guidance of sample pictures, where the prompt names none; 1 turns it off. By default the "
        "model's own: 5 for SD3, 4.5 for Sana, 7.5 for Stable Diffusion 1.x and 2.x.",
        minimum=0.0,
        metavar="SCALE",
    )
    validation_negative_prompt: str = option(
        "",
        "What guidance leads sample pictures away from, where the prompt doesn't say. By default the model's answer "
        "without any prompt.",
    )
    validation_resolution: str | None = option(
        None,
        "Sizes of sample pictures, such as 1024x1024,1280x768 (width x height): a prompt that names no size is sampled "
        "at each, with the same seed. By default the model's own size.",
        parse=parse_sizes,
        metavar="SIZES",
    )
    use_resolution_binning: bool | None = option(
        None,
        "Computes a sample picture at the nearest size of the table that the model was trained with, then resizes and "
        "crops it to the size that was asked for. By default on for Sana; the others have no table.",
    )
    preview_every: int | None = option(
        None,
        "Every so many steps of a sample picture, the unfinished picture is written beside where it will lie, as "
        "..._preview.png, through a map from latents to colours that is fitted to the VAE. By default not.",
        minimum=1,
        metavar="STEPS",
        aliases=("validation_preview_steps",),
    )
    validation_guidance_skip_layers: tuple[int, ...] = option(
        (),
        "Blocks to leave out in skip-layer guidance of sample pictures; 7 8 9 suits SD3.5 medium. By default no "
        "skip-layer guidance.",
        metavar="BLOCK",
    )
    validation_guidance_skip_layers_start: float = option(
        0.01, "Fraction of the steps after which skip-layer guidance acts.", minimum=0.0, maximum=1.0
    )
    validation_guidance_skip_layers_stop: float = option(
        0.2, "Fraction of the steps from which on skip-layer guidance no longer acts.", minimum=0.0, maximum=1.0
    )
    validation_guidance_skip_scale: float = option(2.8, "Strength of skip-layer guidance.")

    def __post_init__(self) -> None:
        moments = [
            name for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first") if getattr(self, name)
        ]
        if moments and not self.has_prompts:
            raise ConfigError(f"--{moments[0]} needs --sample_prompts: a file with the prompts to make pictures of")
        if self.has_prompts and not moments:
            given = f"sample_prompts {self.sample_prompts}" if self.sample_prompts else "validation_prompt"
            raise ConfigError(
                f"--{given} does nothing until it is said when: add --sample_every_n_steps, --sample_every_n_epochs or "
                "--sample_at_first"
            )
        fields = type(self).__dataclass_fields__
        for name in _OF_PICTURES if not self.has_prompts else ():
            if getattr(self, name) != fields[name].default:
                raise ConfigError(
                    f"--{name} does nothing without --sample_prompts: a file with the prompts to make pictures of"
                )
        if self.validation_negative_prompt and self.validation_guidance == 1 and self.sample_prompts is None:
            raise ConfigError(
                "--validation_negative_prompt does nothing at --validation_guidance 1, which is without guidance; "
                "remove one"
            )
        SkipLayerGuidance.of(self)

    @property
    def has_prompts(self) -> bool:
        """Whether there is anything to make pictures of."""
        return self.sample_prompts is not None or bool(self.validation_prompt)

    @property
    def idle_options(self) -> tuple[str, ...]:
        """Options that do nothing as the others are."""
        return () if self.has_prompts else _OF_PICTURES

    @property
    def resolutions(self) -> tuple[Resolution, ...]:
        """The sizes of ``validation_resolution``."""
        sizes = self.validation_resolution.split(",") if self.validation_resolution else []
        return tuple(Resolution(*map(int, size.split("x"))) for size in sizes)


_OF_PICTURES = (
    "sample_sampler",
    "validation_num_inference_steps",
    "validation_guidance",
    "validation_negative_prompt",
    "validation_resolution",
    "use_resolution_binning",
    "preview_every",
)
"""Options of ``SamplingConfig`` that act only where pictures are made."""
