"""Optimizer and learning-rate schedule."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.config.errors import ConfigError, nearest_name
from library.config.options import option

OPTIMIZER_NAMES = (
    "AdamW",
    "AdamW8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "Lion",
    "Lion8bit",
    "PagedLion8bit",
    "SGDNesterov",
    "SGDNesterov8bit",
    "Adafactor",
    "Prodigy",
    "DAdaptation",
    "DAdaptAdam",
    "DAdaptAdaGrad",
    "DAdaptAdan",
    "DAdaptLion",
    "DAdaptSGD",
    "AdamWScheduleFree",
    "SGDScheduleFree",
    "RAdamScheduleFree",
    "CAME",
    "CAME8bit",
    "StableAdamW",
)
_OVER_ALL_PARAMETERS = {
    **dict.fromkeys(
        ("Prodigy", "DAdaptation", "DAdaptAdam", "DAdaptAdaGrad", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"),
        "estimates one learning rate from all gradients together",
    ),
    **dict.fromkeys(
        ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"),
        "moves all weights to and fro between those that it trains and their average",
    ),
}

LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "adafactor",
)
_WITHOUT_WARMUP = ("constant", "piecewise_constant", "adafactor")
_SCHEDULE_OPTIONS = {
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
}


def parse_optimizer_type(value: Any) -> str:
    """This finds the known optimizer of that name, whatever the case; dotted class paths stay as they are."""
    known = {name.lower(): name for name in OPTIMIZER_NAMES}
    text = str(value)
    if text.lower() in known:
        return known[text.lower()]
    if "." in text:
        return text
    near = nearest_name(text.lower(), known)
    hint = f"did you mean {known[near]}?" if near else f"known are {', '.join(OPTIMIZER_NAMES)}"
    raise ValueError(f"unknown optimizer {text!r}; {hint} Any other class goes by its dotted path (package.Class)")


def parse_steps(value: Any) -> int | float:
    """This reads a number of steps (``100``), a fraction of the run (``0.1``) or a percentage (``10%``).

    Returns:
        An int for steps, a float below 1 for a fraction.
    """
    expected = "expected steps (100), a fraction of the run below 1 (0.1) or a percentage (10%)"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{expected}, got {value!r}")
    try:
        if isinstance(value, str) and value.endswith("%"):
            number: int | float = float(value[:-1]) / 100
        elif isinstance(value, str):
            number = float(value) if any(sign in value.lower() for sign in ".e") else int(value)
        else:
            number = value
    except ValueError:
        raise ValueError(f"{expected}, got {value!r}") from None
    if number < 0 or (isinstance(number, float) and not number < 1):
        raise ValueError(f"{expected}, got {value!r}")
    return number


def parse_key_values(arguments: Sequence[str], name: str) -> dict[str, Any]:
    """This turns ``key=value`` texts into a dictionary; a value that is no Python literal stays text.

    Args:
        arguments: The texts; a value may contain ``=``.
        name: The option, for messages.

    Raises:
        ConfigError: A text has no ``=``, or a key stands twice.
    """
    values: dict[str, Any] = {}
    for text in arguments:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise ConfigError(f"--{name}: expected key=value, got {text!r}")
        if key in values:
            raise ConfigError(f"--{name}: {key} is given twice")
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key] = value
    return values


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning rate."""

    optimizer_type: str = option(
        "AdamW",
        f"The optimizer, in any case: {', '.join(OPTIMIZER_NAMES)}; or any class by its dotted path, such as "
        "pytorch_optimizer.Lamb.",
        parse=parse_optimizer_type,
        metavar="NAME",
    )
    optimizer_args: tuple[str, ...] = option(
        (),
        "Arguments of the optimizer as key=value: weight_decay=0.01 betas=0.9,0.99. By default its own defaults.",
        metavar="KEY=VALUE",
    )
    use_8bit_adam: bool = option(False, "Older spelling of --optimizer_type AdamW8bit.")
    use_lion_optimizer: bool = option(False, "Older spelling of --optimizer_type Lion.")
    learning_rate: float | None = option(
        None,
        "Base learning rate. By default 1e-4 for adapters; a full fine-tune must name its own.",
        minimum=0,
        metadata_key="ss_learning_rate",
    )
    unet_lr: float | None = option(
        None,
        "Learning rate of the denoiser's adapter. By default --learning_rate.",
        minimum=0,
        metadata_key="ss_unet_lr",
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        None,
        "Learning rates of the text encoders' adapters: one for all, or one each in the order CLIP-L, CLIP-G, T5 (of "
        "two, the second also serves T5). 0 leaves an encoder out. By default --learning_rate.",
        minimum=0,
        metadata_key="ss_text_encoder_lr",
    )
    max_grad_norm: float = option(
        1.0,
        "Scale gradients down when the norm of all together is above this; 0 never does.",
        minimum=0,
        metadata_key="ss_max_grad_norm",
    )
    lr_scheduler: str = option(
        "constant",
        "How the learning rate changes over the run.",
        choices=LR_SCHEDULERS,
        metadata_key="ss_lr_scheduler",
    )
    lr_warmup_steps: int | float = option(
        0,
        "The learning rate rises from 0 for this long: optimizer steps (100), a fraction of the run (0.1) or a "
        "percentage (10%).",
        parse=parse_steps,
        metavar="STEPS",
        metadata_key="ss_lr_warmup_steps",
    )
    lr_decay_steps: int | float = option(
        0,
        "warmup_stable_decay: the last part of the run, in which the rate falls; forms as in --lr_warmup_steps.",
        parse=parse_steps,
        metavar="STEPS",
    )
    lr_scheduler_num_cycles: int = option(
        1,
        "cosine_with_restarts: number of arcs. cosine_with_min_lr and warmup_stable_decay: number of half waves.",
        minimum=1,
    )
    lr_scheduler_power: float = option(1.0, "polynomial: the power; 1 is a straight line.", minimum=0)
    lr_scheduler_timescale: int | None = option(
        None, "inverse_sqrt: steps until the rate has fallen noticeably. By default the warm-up's length.", minimum=1
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "cosine_with_min_lr and warmup_stable_decay: the lowest rate as a fraction of the learning rate. By default 0.",
        minimum=0,
        maximum=1,
    )
    lr_scheduler_type: str | None = option(
        None,
        "A schedule class of torch.optim.lr_scheduler by name, or any by its dotted path, instead of --lr_scheduler. "
        "By default none.",
        metavar="CLASS",
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (),
        "Arguments of the schedule as key=value: for --lr_scheduler_type the class's own, for piecewise_constant "
        "step_rules=1:10,0.1:20,0.005, for polynomial lr_end=1e-7. By default none.",
        metavar="KEY=VALUE",
    )

    def __post_init__(self) -> None:
        problems = [*self._optimizer_problems(), *self._schedule_problems()]
        for name in ("optimizer_args", "lr_scheduler_args"):
            try:
                parse_key_values(getattr(self, name), name)
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def idle_options(self) -> tuple[str, ...]:
        """The options that the schedule doesn't use; saved files don't mention them."""
        if self.lr_scheduler_type is not None:
            return ("lr_scheduler", "lr_warmup_steps")
        return ("lr_warmup_steps",) if self.lr_scheduler in _WITHOUT_WARMUP else ()

    @property
    def name(self) -> str:
        """The optimizer's name, older spellings resolved."""
        if self.use_8bit_adam:
            return "AdamW8bit"
        return "Lion" if self.use_lion_optimizer else self.optimizer_type

    @property
    def over_all_parameters(self) -> str | None:
        """Why the optimizer can't step one parameter at a time; None when it can, as far as its name says."""
        return _OVER_ALL_PARAMETERS.get(self.name)

    def _optimizer_problems(self) -> list[str]:
        problems = []
        older = [name for name in ("use_8bit_adam", "use_lion_optimizer") if getattr(self, name)]
        if len(older) > 1 or (older and self.optimizer_type != "AdamW"):
            chosen = " and ".join([f"--{name}" for name in older] + ["--optimizer_type"] * (len(older) == 1))
            problems.append(f"{chosen} choose two optimizers; keep --optimizer_type alone")
        if self.text_encoder_lr is not None and not 1 <= len(self.text_encoder_lr) <= 3:
            problems.append(f"--text_encoder_lr takes 1 to 3 values, got {len(self.text_encoder_lr)}")
        return problems

    def _schedule_problems(self) -> list[str]:
        if self.lr_scheduler_type:
            problems = []
            if self.lr_scheduler != "constant":
                problems.append(
                    f"--lr_scheduler_type {self.lr_scheduler_type} replaces --lr_scheduler {self.lr_scheduler}; "
                    "keep one"
                )
            if self.lr_warmup_steps:
                problems.append(
                    f"--lr_warmup_steps does nothing with --lr_scheduler_type; give {self.lr_scheduler_type} its own "
                    "warm-up through --lr_scheduler_args"
                )
            return problems
        problems = []
        if self.lr_warmup_steps and self.lr_scheduler in _WITHOUT_WARMUP:
            problems.append(
                f"--lr_scheduler {self.lr_scheduler} has no warm-up, but --lr_warmup_steps is {self.lr_warmup_steps}; "
                "use --lr_scheduler constant_with_warmup or remove --lr_warmup_steps"
            )
        for name, schedulers in _SCHEDULE_OPTIONS.items():
            if (
                getattr(self, name) != type(self).__dataclass_fields__[name].default
                and self.lr_scheduler not in schedulers
            ):
                problems.append(
                    f"--{name} does nothing with --lr_scheduler {self.lr_scheduler}; it is for {', '.join(schedulers)}"
                )
        arguments = self.lr_scheduler_args
        if self.lr_scheduler == "piecewise_constant" and not any(text.startswith("step_rules=") for text in arguments):
            problems.append(
                "--lr_scheduler piecewise_constant needs --lr_scheduler_args step_rules=1:10,0.1:20,0.005 "
                "(multiplier:until step, ..., last multiplier)"
            )
        elif arguments and self.lr_scheduler not in ("piecewise_constant", "polynomial"):
            problems.append(f"--lr_scheduler_args does nothing with --lr_scheduler {self.lr_scheduler}; remove it")
        if self.lr_scheduler == "adafactor" and not self._sets_its_own_rate():
            problems.append(
                "--lr_scheduler adafactor only reports the rate that Adafactor chooses by itself; it needs "
                "--optimizer_type Adafactor --optimizer_args relative_step=True. With a learning rate of your own use "
                "--lr_scheduler constant"
            )
        return problems

    def _sets_its_own_rate(self) -> bool:
        arguments = (text.replace(" ", "") for text in self.optimizer_args)
        return self.optimizer_type == "Adafactor" and "relative_step=True" in arguments
