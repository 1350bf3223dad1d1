"""Options of pictures made while training."""

from dataclasses import dataclass
from typing import Any

from library.config.errors import ConfigError
from library.config.options import option
from library.records import ModelDescription

SAMPLERS = ("euler", "heun", "dpmpp_2m")


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
    if skip is None or max(skip.layers) < description.blocks:
        return []
    return [
        f"--validation_guidance_skip_layers {max(skip.layers)}: the denoiser has blocks 0 to {description.blocks - 1}"
    ]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sample pictures while training."""

    sample_prompts: str | None = option(
        None,
        "File of prompts (.txt, .toml or .json) to make pictures of while training, in <output_dir>/sample. By "
        "default none are made.",
        metavar="FILE",
    )
    sample_every_n_steps: int | None = option(
        None, "Makes sample pictures every N optimizer steps.", minimum=1, metavar="N"
    )
    sample_every_n_epochs: int | None = option(
        None, "Makes sample pictures at the end of every Nth epoch.", minimum=1, metavar="N"
    )
    sample_at_first: bool = option(False, "Makes sample pictures before the first step too.")
    sample_sampler: str = option(
        "euler",
        "Sampler of sample pictures, where the prompt names none. heun asks the model twice per step.",
        choices=SAMPLERS,
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
        if moments and self.sample_prompts is None:
            raise ConfigError(f"--{moments[0]} needs --sample_prompts: a file with the prompts to make pictures of")
        if self.sample_prompts is not None and not moments:
            raise ConfigError(
                f"--sample_prompts {self.sample_prompts} does nothing until it is said when: add "
                "--sample_every_n_steps, --sample_every_n_epochs or --sample_at_first"
            )
        SkipLayerGuidance.of(self)
