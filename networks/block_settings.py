"""The adapter's settings per block of a U-Net, as ``--network_args`` gives them: ranks, alphas, learning rates.

Blocks are counted as kohya's scripts count them: the first convolution's and all others on the way down, the middle,
and those on the way up; 12 + 1 + 12 in Stable Diffusion 1.x and 2.x.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.config.errors import ConfigError
from library.records import AdapterTargets

RANK_LISTS = ("block_dims", "conv_block_dims")
ALPHA_LISTS = ("block_alphas", "conv_block_alphas")
ZERO_THRESHOLD = "block_lr_zero_threshold"
_SHAPES = {
    "linear": lambda place: place,
    "reverse_linear": lambda place: 1 - place,
    "sine": lambda place: math.sin(math.pi * place / 2),
    "cosine": lambda place: math.sin(math.pi * (1 - place) / 2),  # exactly 0 at the end, where a cosine isn't
    "zeros": lambda place: 0.0,
}
"""Name of a course of learning rates -> the factor at a place between a way's first block (0) and its last (1)."""


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """What is said of each block, in forward order; an empty list says nothing.

    Attributes:
        ranks: Of linear layers and 1x1 convolutions; 0 leaves them out.
        alphas: Of the same.
        conv_ranks: Of convolutions with larger kernels; 0 leaves them out.
        conv_alphas: Of the same.
        rates: What the learning rate is multiplied by; a block at 0 gets no adapter.
    """

    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    conv_ranks: tuple[int, ...] = ()
    conv_alphas: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The settings that are given, as they are typed; one stands for all learning rates."""
        typed = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "..._lr_weight")
        lists = (self.ranks, self.alphas, self.conv_ranks, self.conv_alphas, self.rates)
        return tuple(name for name, given in zip(typed, lists) if given)


NO_BLOCKS = BlockSettings()
"""Nothing is said of any block."""


def rate_name(way: str) -> str:
    """The ``--network_args`` name of a way's learning rates: ``down_lr_weight``."""
    return f"{way}_lr_weight"


def block_setting_names(targets: Mapping[str, AdapterTargets]) -> tuple[str, ...]:
    """The names in ``--network_args`` that say something of blocks; none for a model without a way down and up."""
    ways = _ways(targets)
    return (*RANK_LISTS, *ALPHA_LISTS, *map(rate_name, ways), ZERO_THRESHOLD) if ways else ()


def read_block_settings(arguments: Mapping[str, str], targets: Mapping[str, AdapterTargets]) -> BlockSettings:
    """This reads the settings per block.

    Args:
        arguments: ``--network_args``, name -> text; others are passed over.
        targets: The family's, by component; one of them at most has ways.

    Raises:
        ConfigError: A list has another length than the model has blocks, a value is unusable, or one does nothing.
    """
    ways = _ways(targets)
    count = sum(ways.values())
    given = {name: arguments[name] for name in block_setting_names(targets) if name in arguments}
    if not given:
        return NO_BLOCKS
    _check_companions(arguments)
    numbers = {name: _numbers(name, given[name], count) for name in (*RANK_LISTS, *ALPHA_LISTS) if name in given}
    for name in RANK_LISTS:
        if any(rank != int(rank) for rank in numbers.get(name, ())):
            raise ConfigError(f"--network_args {name}: expected whole numbers, got {given[name]!r}")
    ranks, conv_ranks = (tuple(map(int, numbers.get(name, ()))) for name in RANK_LISTS)
    alphas, conv_alphas = (numbers.get(name, ()) for name in ALPHA_LISTS)
    return BlockSettings(
        ranks=ranks, alphas=alphas, conv_ranks=conv_ranks, conv_alphas=conv_alphas, rates=_rates(given, ways)
    )


def _ways(targets: Mapping[str, AdapterTargets]) -> dict[str, int]:
    """Name of a way -> how many blocks it has."""
    return {way: len(blocks) for target in targets.values() for way, blocks in target.ways.items()}


def _check_companions(arguments: Mapping[str, str]) -> None:
    if "conv_block_dims" in arguments and "conv_dim" in arguments:
        raise ConfigError("--network_args conv_dim does nothing with conv_block_dims, which says it of each block")
    if "conv_block_alphas" in arguments and "conv_alpha" in arguments:
        raise ConfigError("--network_args conv_alpha does nothing with conv_block_alphas, which says it of each block")
    if "conv_block_alphas" in arguments and not {"conv_dim", "conv_block_dims"} & set(arguments):
        raise ConfigError(
            "--network_args conv_block_alphas does nothing without conv_dim or conv_block_dims; add one or remove it"
        )


def _rates(given: Mapping[str, str], ways: Mapping[str, int]) -> tuple[float, ...]:
    named = [rate_name(way) for way in ways if rate_name(way) in given]
    if not named:
        if ZERO_THRESHOLD in given:
            every = ", ".join(map(rate_name, ways))
            raise ConfigError(f"--network_args {ZERO_THRESHOLD} does nothing without {every}; remove it")
        return ()
    rates = [rate for way, count in ways.items() for rate in _way_rates(rate_name(way), given, count)]
    threshold = 0.0
    if ZERO_THRESHOLD in given:
        (threshold,) = _numbers(ZERO_THRESHOLD, given[ZERO_THRESHOLD], 1)
    return tuple(rate if rate > threshold else 0.0 for rate in rates)


def _way_rates(name: str, given: Mapping[str, str], count: int) -> Sequence[float]:
    if name not in given:
        return [1.0] * count
    shape, plus, offset = given[name].partition("+")
    if shape.strip() not in _SHAPES:
        return _numbers(name, given[name], count, or_else=f", or one of {', '.join(_SHAPES)}, with +0.25 to add to all")
    added = _numbers(name, offset, 1)[0] if plus else 0.0
    course = _SHAPES[shape.strip()]
    return [course(number / max(count - 1, 1)) + added for number in range(count)]


def _numbers(name: str, text: str, count: int, *, or_else: str = "") -> tuple[float, ...]:
    parts = [part.strip() for part in text.strip("[]()").split(",")]
    of_blocks = "a number" if count == 1 else f"{count} numbers, one per block of this model and separated by commas"
    wrong = ConfigError(f"--network_args {name}: expected {of_blocks}{or_else}, got {text!r} ({len(parts)} values)")
    if len(parts) != count:
        raise wrong
    try:
        numbers = tuple(map(float, parts))
    except ValueError:
        raise wrong from None
    if not all(0 <= number < math.inf for number in numbers):
        raise ConfigError(f"--network_args {name}: expected numbers of at least 0, got {text!r}")
    return numbers
