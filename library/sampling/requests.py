"""The pictures that a training run makes while it trains: its options and prompt file, joined and checked."""

from collections.abc import Sequence

from library.config.errors import ConfigError
from library.config.sampling import SamplingConfig, binning_table
from library.records import ModelDescription
from library.sampling.prompt_files import PromptEntry, read_entries
from library.sampling.prompts import PromptRequest, SizeRules, make_requests


def requested_samples(
    sampling: SamplingConfig, description: ModelDescription, *, resolution_step: int, seed: int, steered: bool = False
) -> list[PromptRequest]:
    """This lists the sample pictures; none unless something asks for them.

    Args:
        sampling: The options.
        description: The model.
        resolution_step: Both sides must be multiples of this many pixels.
        seed: Of the run.
        steered: Whether a ControlNet steers them.

    Raises:
        ConfigError: The prompt file is wrong, a size can't be made, or an option does nothing here.
    """
    if not sampling.has_prompts:
        return []
    own = description.sampling
    sizes = SizeRules(
        native=description.native_resolution,
        listed=sampling.resolutions,
        step=resolution_step,
        largest_side=description.largest_side,
        table=binning_table(sampling, description),
    )
    for size in sizes.listed:
        for name, side in (("width", size.width), ("height", size.height)):
            sizes.check(f"--validation_resolution {size}: {name}", side)
    fallbacks = {
        "sampler": sampling.sample_sampler or own.sampler,
        "steps": sampling.validation_num_inference_steps or own.steps,
        "scale": own.scale if sampling.validation_guidance is None else sampling.validation_guidance,
        "negative_prompt": sampling.validation_negative_prompt,
    }
    entries = typed_prompts("validation_prompt", sampling.validation_prompt)
    if sampling.sample_prompts is not None:
        entries += read_entries(sampling.sample_prompts)
    requests = make_requests(entries, sizes, seed=seed, samplers=own.samplers, fallbacks=fallbacks, steered=steered)
    check_previews(sampling.preview_every, requests)
    return requests


def typed_prompts(option: str, prompts: Sequence[str]) -> list[PromptEntry]:
    """The prompts of the command line.

    Args:
        option: That they were typed after.
        prompts: Pure text.
    """
    return [PromptEntry(f"--{option} {number}", {"prompt": text}) for number, text in enumerate(prompts, start=1)]


def check_previews(every: int | None, requests: Sequence[PromptRequest]) -> None:
    """This refuses previews that never come.

    Args:
        every: Of ``--preview_every``.
        requests: The pictures.

    Raises:
        ConfigError: No picture has that many steps before its last.
    """
    most = max(request.steps for request in requests)
    if every is not None and every >= most:
        raise ConfigError(
            f"--preview_every {every} does nothing: no picture has more than {most} steps, and the last step gives the "
            "finished one"
        )
