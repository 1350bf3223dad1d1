"""How long, in which precision, and from where."""

from dataclasses import dataclass
from typing import Any

from library.config.errors import ConfigError
from library.config.options import option

AUTO = "auto"
"""The value of ``--resume`` that finds the state by itself."""


def parse_resume(value: Any) -> str:
    """This reads ``latest``, the older word, as ``auto``; anything else is a folder."""
    return AUTO if value == "latest" else str(value)


NON_FINITE_POLICIES = ("stop", "skip", "rollback")
MOST_SKIPPED_IN_A_ROW = 10
"""So many steps in a row may be skipped; one more and the run stops."""
MOST_ROLLBACKS = 3
"""So often a run may go back to one state; then it must have come to the next."""
MOST_BUNDLES = 3
"""So many dropped steps of a run get a replay bundle."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training."""

    max_train_steps: int = option(
        1600, "Optimizer steps of the whole run.", minimum=1, metadata_key="ss_max_train_steps"
    )
    max_train_epochs: int | None = option(
        None,
        "Passes over the dataset; they replace --max_train_steps. By default the steps count.",
        minimum=1,
        aliases=("num_train_epochs",),
    )
    gradient_accumulation_steps: int = option(
        1,
        "Micro-batches per optimizer step and process: a larger batch without more memory.",
        minimum=1,
        metadata_key="ss_gradient_accumulation_steps",
    )
    mixed_precision: str = option(
        "bf16",
        "The type that the model computes in and that its frozen weights are kept in; no means fp32. fp16 is for cards "
        "without bf16 and scales the loss.",
        choices=("no", "fp16", "bf16"),
        metadata_key="ss_mixed_precision",
    )
    full_fp16: bool = option(
        False,
        "Keep the trained weights in fp16 too; needs --mixed_precision fp16. By default they are fp32, which learns "
        "small updates better.",
        metadata_key="ss_full_fp16",
    )
    full_bf16: bool = option(
        False,
        "Keep the trained weights in bf16 too; needs --mixed_precision bf16. By default they are fp32, which learns "
        "small updates better.",
        metadata_key="ss_full_bf16",
    )
    stochastic_rounding: bool = option(
        False,
        "With --full_bf16: each step is computed in fp32 and rounded up or down at random, the nearer the likelier, so "
        "that updates smaller than bf16's last bit are learnt on average. The rounding follows --seed.",
        metadata_key="ss_stochastic_rounding",
    )
    kahan_summation: bool = option(
        False,
        "With --full_bf16: each step is computed in fp32, and what rounding to bf16 takes from a weight is kept and "
        "added back before the next step, so that no update is lost. Takes 2 bytes more per number.",
        metadata_key="ss_kahan_summation",
    )
    seed: int | None = option(
        None,
        "Seed of every random draw: the same seed gives the same draws on any number of devices. By default one is "
        "drawn and written into the resolved configuration.",
        minimum=0,
        metadata_key="ss_seed",
    )
    resume: str | None = option(
        None,
        "Folder of a saved state (<name>-...-state) to go on from, exactly where it stopped; or auto (latest is the "
        "same): the newest whole state of --output_name in --output_dir, a fresh run where there is none, and nothing "
        "at all where the run is done. By default a fresh run.",
        metavar="FOLDER",
        aliases=("resume_from_checkpoint",),
        parse=parse_resume,
    )
    resume_anyway: bool = option(
        False,
        "Go on although something that the result depends on differs from the run that the state was saved from: a "
        "warning instead of an error, where that is possible at all.",
    )
    max_train_seconds: int | None = option(
        None,
        "End the run after the step in which so many seconds are over, with a state to resume from, and exit with 124. "
        "They count from when the run begins to load; leave time to write the state. By default no limit.",
        minimum=1,
    )
    on_nonfinite: str = option(
        "stop",
        "What happens when a step's loss or gradient is no finite number. stop: the run ends with exit code 2, and "
        "nothing of the step is applied or saved. skip: the step's update is dropped and the run goes on; more than "
        f"{MOST_SKIPPED_IN_A_ROW} in a row stop it. rollback: weights, optimizer and average go back to the state that "
        "was saved last, and the run goes on with the pictures after the step; more than "
        f"{MOST_ROLLBACKS} times to one state stop it. Each writes a bundle for tools/replay.py, for the first "
        f"{MOST_BUNDLES} dropped steps.",
        choices=NON_FINITE_POLICIES,
    )
    replay_bundle_at_step: int | None = option(
        None,
        "Write a bundle for tools/replay.py at this optimizer step and go on: to do the step again on another machine "
        "and compare. By default none.",
        minimum=1,
    )
    ddp_timeout: int | None = option(
        None, "Minutes after which processes that wait for each other give up. By default torch's own limit.", minimum=1
    )

    @property
    def idle_options(self) -> tuple[str, ...]:
        """The option that the other one replaces; saved files don't mention it."""
        return ("max_train_steps",) if self.max_train_epochs is not None else ()

    def __post_init__(self) -> None:
        problems = []
        if self.full_fp16 and self.full_bf16:
            problems.append("--full_fp16 and --full_bf16 exclude each other; keep the one of --mixed_precision")
        for precision in ("fp16", "bf16"):
            if getattr(self, f"full_{precision}") and self.mixed_precision != precision:
                problems.append(
                    f"--full_{precision} needs --mixed_precision {precision}, but it is {self.mixed_precision}"
                )
        if self.resume_anyway and not self.resume:
            problems.append("--resume_anyway does nothing without --resume; add it or remove --resume_anyway")
        if self.stochastic_rounding and not self.full_bf16:
            problems.append("--stochastic_rounding does nothing without --full_bf16; add it or remove it")
        if self.kahan_summation and not self.full_bf16:
            problems.append("--kahan_summation does nothing without --full_bf16; add it or remove it")
        if self.kahan_summation and self.stochastic_rounding:
            problems.append("--kahan_summation and --stochastic_rounding exclude each other; keep one")
        if problems:
            raise ConfigError("\n".join(problems))
