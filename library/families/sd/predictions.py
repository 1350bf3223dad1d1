"""What a model of Stable Diffusion 1.x or 2.x answers with, noise or velocities, as far as its files tell."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.config.ddpm import DdpmConfig
from library.families.sd.options import SdOptions

_SAID = {False: "the noise (epsilon)", True: "velocities (v_prediction)"}


@dataclass(frozen=True)
class PredictionDefaults:
    """The parts of a ``ModelDescription`` that follow.

    Attributes:
        defaults: Option -> value.
        stated: Option -> what the files say.
        unsure: Option -> why its default is a guess.
    """

    defaults: Mapping[str, bool | str]
    stated: Mapping[str, str]
    unsure: Mapping[str, str]


def prediction_defaults(
    title: str, *, is_v2: bool, v_prediction: bool | None, zero_terminal_snr: bool
) -> PredictionDefaults:
    """This decides which objective acts where nobody says it.

    Args:
        title: Where the weights lie.
        is_v2: Whether the model is of the second generation.
        v_prediction: Whether it predicts velocities, where the files say so; None: they don't.
        zero_terminal_snr: Whether its schedule ends in pure noise, as the files say.
    """
    defaults: dict[str, bool | str] = {"v_parameterization": bool(v_prediction), "huber_schedule": "snr"}
    if is_v2:
        defaults["v2"] = True
    if zero_terminal_snr:
        defaults["zero_terminal_snr"] = True
    if v_prediction is not None:
        said = f"the files of {title} say that it predicts {_SAID[v_prediction]}"
        return PredictionDefaults(defaults, {"v_parameterization": said}, {})
    unsure = (
        f"{title} is Stable Diffusion 2.x and does not say what it predicts. It is taken for a model of 512 px, which "
        "predicts the noise; if it is one of 768 px, add --v_parameterization, else --no-v_parameterization"
    )
    return PredictionDefaults(defaults, {}, {"v_parameterization": unsure} if is_v2 else {})


def specification(options: SdOptions, *, velocity: bool) -> dict[str, str]:
    """What saved files say of the objective, under the names of the ``modelspec`` standard.

    Args:
        options: Of the family.
        velocity: Whether the model predicts velocities.
    """
    said = {"prediction_type": "v" if velocity else "epsilon"}
    return said if options.clip_skip is None else {**said, "encoder_layer": str(options.clip_skip)}


def own_prediction(ddpm: DdpmConfig, v_prediction: bool | None) -> bool:
    """Whether the model predicts velocities: what was said, else what its files say, else not.

    Args:
        ddpm: What was said.
        v_prediction: Whether it predicts velocities, where the files say so; None: they don't.
    """
    return bool(v_prediction) if ddpm.v_parameterization is None else ddpm.v_parameterization


def own_schedule_end(ddpm: DdpmConfig, zero_terminal_snr: bool) -> bool:
    """Whether the schedule ends in pure noise: what was said, else what the files say.

    Args:
        ddpm: What was said.
        zero_terminal_snr: What the files say.
    """
    return zero_terminal_snr if ddpm.zero_terminal_snr is None else ddpm.zero_terminal_snr
