"""Pictures to make: what each shows, its size, seed and settings, from what a prompt file or the options say."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from library.config.errors import ConfigError
from library.config.messages import shown
from library.config.samplers import SAMPLERS
from library.randomness import seed_for
from library.records import Resolution, SamplingDefaults
from library.sampling.binning import nearest_in_table
from library.sampling.prompt_files import PromptEntry, given_fields, read_entries


class PromptText(NamedTuple):
    """A text that the denoiser has to know.

    Attributes:
        text: Empty: the unconditional one.
        negative: Whether guidance leads away from it; the unconditional one counts as neither.
    """

    text: str
    negative: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptRequest:
    """One picture to make.

    Attributes:
        prompt: What it shows.
        negative_prompt: What guidance leads away from; the empty text is the unconditional answer.
        width: Pixels.
        height: Pixels.
        seed: Of the initial noise.
        steps: Sampling steps.
        scale: Classifier-free guidance; at 1 there is none, and the negative prompt has no effect.
        sampler: One of ``library.config.samplers.SAMPLERS``; None leaves the choice to whoever draws it.
        name: What a library of prompts calls it; empty: nothing.
        computed_at: The size that it is computed at, before it is resized and cropped; None: its own.
        control: The file of the control picture that a ControlNet steers it by; None: nothing steers.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    seed: int
    steps: int = SamplingDefaults.steps
    scale: float = SamplingDefaults.scale
    sampler: str | None = None
    name: str = ""
    computed_at: Resolution | None = None
    control: str | None = None

    @property
    def resolution(self) -> Resolution:
        """The picture's size."""
        return Resolution(self.width, self.height)

    @property
    def file_stem(self) -> str:
        """The end of its file's name: its own name, if any, and its seed."""
        return f"{self.name}_{self.seed}" if self.name else str(self.seed)

    @property
    def texts(self) -> tuple[PromptText, ...]:
        """The texts that the denoiser has to know: the negative prompt only where it acts."""
        negative = PromptText(self.negative_prompt, negative=bool(self.negative_prompt))
        return (PromptText(self.prompt),) if self.scale == 1 else (PromptText(self.prompt), negative)


def complete(given: Mapping[str, Any], index: int, *, native_resolution: Resolution, seed: int) -> PromptRequest:
    """This fills in what a prompt doesn't say.

    Args:
        given: Fields of ``PromptRequest``, ``prompt`` among them.
        index: The prompt's place in its file, from 0.
        native_resolution: The size of a picture that names none.
        seed: Of the run. A prompt without a seed gets its own, a function of this one and ``index``.
    """
    known = {
        "width": native_resolution.width,
        "height": native_resolution.height,
        "seed": seed_for(seed, "sample", index) % 2**32,
        **given,
    }
    return PromptRequest(**known)


def read_prompts(
    path: str | Path,
    *,
    native_resolution: Resolution,
    resolution_step: int,
    seed: int,
    largest_side: int | None = None,
    fallbacks: Mapping[str, Any] = types.MappingProxyType({}),
    steered: bool = False,
) -> list[PromptRequest]:
    """This reads a prompt file.

    Args:
        path: A ``.txt``, ``.toml`` or ``.json`` file.
        native_resolution: The size of a picture whose prompt names none.
        resolution_step: Both sides must be multiples of this many pixels.
        seed: Of the run; see ``complete``.
        largest_side: The longest side in pixels that the model can make; None: any.
        fallbacks: Fields of ``PromptRequest`` for prompts that don't say them.
        steered: Whether a ControlNet steers them.

    Raises:
        ConfigError: The file is missing, empty or says something that isn't understood; all mistakes at once, one line
            each, with the line or the prompt's number.
    """
    sizes = SizeRules(native=native_resolution, step=resolution_step, largest_side=largest_side)
    return make_requests(read_entries(path), sizes, seed=seed, fallbacks=fallbacks, steered=steered)


@dataclass(frozen=True, kw_only=True)
class SizeRules:
    """Which sizes pictures get.

    Attributes:
        native: The size of a picture whose prompt names none.
        listed: The sizes at which each prompt that names none is made, in place of ``native``.
        step: Both sides must be multiples of this many pixels, where there is no table.
        largest_side: The longest side in pixels that the model can make; None: any.
        table: Name of the table of sizes that pictures are computed at (``binning``); None: at their own size.
    """

    native: Resolution
    listed: tuple[Resolution, ...] = ()
    step: int
    largest_side: int | None = None
    table: str | None = None

    def check(self, name: str, value: int) -> None:
        """This refuses a width or height that can't be made; ``name`` is the start of the error."""
        if self.table is None:
            check_side(name, value, self.step, self.largest_side)


def make_requests(
    entries: Sequence[PromptEntry],
    sizes: SizeRules,
    *,
    seed: int,
    samplers: Sequence[str] = SAMPLERS,
    fallbacks: Mapping[str, Any] = types.MappingProxyType({}),
    steered: bool = False,
) -> list[PromptRequest]:
    """This turns what was said into pictures to make: of each prompt one, or one per listed size.

    Args:
        entries: The prompts.
        sizes: Which sizes pictures get.
        seed: Of the run; see ``complete``.
        samplers: Those that the model has.
        fallbacks: Fields of ``PromptRequest`` for prompts that don't say them.
        steered: Whether a ControlNet steers them, each by its control picture.

    Raises:
        ConfigError: All mistakes at once, one line each, with the prompt's place.
    """
    requests, problems, unsized = [], [], not sizes.listed
    for index, entry in enumerate(entries):
        try:
            given = given_fields(entry, samplers)
            for side in ("width", "height"):
                if side in given:
                    sizes.check(f"{entry.where}: {side}", given[side])
            check_control(entry.where, given.get("control"), steered=steered)
            known = {**fallbacks, **given}
            if given.get("negative_prompt") and known.get("scale") == 1:
                raise ConfigError(f"{entry.where}: the negative prompt does nothing at guidance scale 1; remove one")
        except ConfigError as error:
            problems.append(str(error))
            continue
        has_size = "width" in given or "height" in given
        unsized = unsized or not has_size
        for size in (sizes.native,) if has_size else sizes.listed or (sizes.native,):
            request = complete(known, index, native_resolution=size, seed=seed)
            if sizes.table is not None:
                nearest = nearest_in_table(sizes.table, request.resolution)
                request = replace(request, computed_at=None if nearest == request.resolution else nearest)
            requests.append(request)
    if not problems and not unsized:
        problems.append("--validation_resolution does nothing: every prompt says its own size. Remove it")
    if problems:
        raise ConfigError("\n".join(problems))
    return requests


def check_control(where: str, control: str | None, *, steered: bool) -> None:
    """This refuses a control picture that nothing follows, one that is missing, and one that can't be read.

    Args:
        where: The prompt, for the start of the error.
        control: The file, or None.
        steered: Whether a ControlNet steers.
    """
    if control is None:
        if steered:
            raise ConfigError(
                f"{where}: the control picture is missing, by which the ControlNet steers; add --cn FILE to the line, "
                "or controlnet_image in a .toml or .json"
            )
        return
    if not steered:
        raise ConfigError(
            f"{where}: the control picture {shown(control)} does nothing: samples of train_control_net.py alone follow "
            "one. Remove it"
        )
    from library.data.images import decode_problem  # heavy, and few have a control picture

    try:
        problem = decode_problem(Path(control).read_bytes())
    except OSError as error:
        problem = error.strerror
    if problem is not None:
        raise ConfigError(f"{where}: the control picture {shown(control)} can't be read: {problem}")


def check_side(name: str, value: int, step: int, largest: int | None = None) -> None:
    """This refuses a width or height that the model can't make; the error names the nearest ones that it can.

    Args:
        name: ``--width`` or whatever the user wrote, for the start of the error.
        value: Pixels.
        step: Sides must be multiples of it.
        largest: The longest side that the model can make; None: any.
    """
    if largest is not None and value > largest:
        raise ConfigError(f"{name} {value} is too large for this model, whose table of positions ends at {largest}")
    if value % step == 0:
        return
    below = value // step * step
    nearest = f"{below} and {below + step}" if below else str(step)
    raise ConfigError(f"{name} {value} isn't a multiple of {step}; the nearest are {nearest}")
