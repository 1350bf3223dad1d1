"""The adapter's settings: ``--network_dim`` and its companions with ``--network_args``, read once and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from library.config.errors import ConfigError
from library.config.network import LYCORIS, TRUE_TEXTS, NetworkConfig, split_network_args
from library.records import AdapterTargets
from networks.block_settings import (
    ALPHA_LISTS,
    NO_BLOCKS,
    RANK_LISTS,
    BlockSettings,
    block_setting_names,
    read_block_settings,
)
from networks.setting_names import FALSE_TEXTS, check_names

_RANKS_BY_HAND = (
    "conv_dim",
    "conv_alpha",
    "emb_dims",
    "preset",
    "train_block_indices",
    "factor",
    "decompose_both",
    "full_matrix",
    *RANK_LISTS,
    *ALPHA_LISTS,
)
_OF_ALL = ("conv_dim", "conv_alpha", "preset", "train_block_indices", "rank_dropout", "module_dropout")
_PRESETS: Mapping[str, tuple[str, ...]] = {"full": ("",), "attn-mlp": ("attn", "mlp"), "attn-only": ("attn",)}
"""LyCORIS's name -> what the names of the types of layers contain that it keeps."""

_OF_METHOD: Mapping[str, tuple[str, ...]] = {
    "lora": ("dropout", "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
    "lokr": ("factor", "decompose_both", "full_matrix"),
    "loha": (),
}
OWN_NAMES = (*_OF_ALL, *(name for names in _OF_METHOD.values() for name in names))
"""The ``--network_args`` that every model has."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Which kind the adapter is, how large, where it goes and what is dropped while it trains.

    Attributes:
        method: ``lora``, ``lokr`` or ``loha``.
        rank: Of layers that nothing else is said about.
        alpha: The update is multiplied by alpha / rank; 0 means alpha = rank.
        conv_rank: Rank of convolutions with kernels larger than 1; None leaves them out.
        conv_alpha: Alpha of the same.
        type_ranks: Name of a layer type (``AdapterTargets.dims``) -> its rank; 0 leaves it out.
        optional_ranks: Ranks of the layers in ``AdapterTargets.optional``, in that order; 0 leaves them out.
        block_indices: The blocks that get an adapter; None: all of them.
        switches: Which of the components' ``AdapterTargets.enabled_by`` are on.
        dropout: Probability of dropping an activation of the rank.
        rank_dropout: Probability per sample of dropping a component of the rank.
        module_dropout: Probability of skipping a layer's update.
        factor: LoKr's: what one side of the Kronecker product should be; -1 makes both as equal as can be.
        type_factors: Name of a layer type -> its own factor.
        decompose_both: LoKr's: whether the first factor may be a product of two matrices too.
        full_matrix: LoKr's: whether both factors are whole whatever the rank.
        loraplus_unet_lr_ratio: Learning rate of ``up`` over that of ``down`` in the denoiser (LoRA+).
        loraplus_text_encoder_lr_ratio: The same in the text encoders.
        blocks: What is said of each block of a U-Net.
        typed: Names in ``--network_args``: what stands there must act.
    """

    method: str = "lora"
    rank: int
    alpha: float
    conv_rank: int | None = None
    conv_alpha: float = 1.0
    type_ranks: Mapping[str, int] = field(default_factory=dict)
    optional_ranks: tuple[int, ...] = ()
    block_indices: tuple[int, ...] | None = None
    switches: frozenset[str] = frozenset()
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    factor: int = -1
    type_factors: Mapping[str, int] = field(default_factory=dict)
    decompose_both: bool = False
    full_matrix: bool = False
    loraplus_unet_lr_ratio: float = 1.0
    loraplus_text_encoder_lr_ratio: float = 1.0
    blocks: BlockSettings = NO_BLOCKS
    typed: frozenset[str] = frozenset()

    @property
    def has_convolutions(self) -> bool:
        """Whether convolutions with kernels larger than 1 get an adapter."""
        return self.conv_rank is not None or bool(self.blocks.conv_ranks)


def factor_name(type_name: str) -> str:
    """The ``--network_args`` name of a layer type's LoKr factor: ``x_attn_factor`` for ``x_attn_dim``."""
    return type_name.removesuffix("_dim") + "_factor"


def read_settings(network: NetworkConfig, targets: Mapping[str, AdapterTargets]) -> AdapterSettings:
    """This reads the settings that the user asked for.

    Args:
        network: The options.
        targets: The family's, by component. They say which layer types and switches there are.

    Raises:
        ConfigError: A name is unknown, a value is unusable, or two contradict each other.
    """
    arguments = dict(split_network_args(network.network_args))
    method = network.method
    arguments.pop("algo", None)
    types = {name for targets_of in targets.values() for name in targets_of.dims}
    factors = {factor_name(name): name for name in types} if method == "lokr" else {}
    switches = {targets_of.enabled_by for targets_of in targets.values() if targets_of.enabled_by}
    optional = max((len(targets_of.optional) for targets_of in targets.values()), default=0)
    known = {*types, *factors, *switches, *_OF_ALL, *_OF_METHOD[method], *(["emb_dims"] if optional else [])}
    known |= {*block_setting_names(targets)}
    check_names(arguments, known, method)
    if network.dim_from_weights:
        _check_ranks_come_from_file(arguments, {*types, *factors})
    full_matrix = _boolean("full_matrix", arguments.get("full_matrix", "false"))
    if full_matrix:
        _check_whole_factors(network, arguments, types)

    text = arguments.get
    blocks = read_block_settings(arguments, targets)
    if both := [name for name in sorted(types) if name in arguments and blocks.ranks]:
        raise ConfigError(f"--network_args {both[0]} and block_dims both set the rank of the same layers; keep one")
    conv_rank, conv_alpha = _convolutions(network, arguments, targets)
    ratio = _number("loraplus_lr_ratio", text("loraplus_lr_ratio"), 1.0, above=0.0)
    if "conv_alpha" in arguments and conv_rank is None and not blocks.conv_ranks:
        raise ConfigError("--network_args conv_alpha does nothing without conv_dim; add conv_dim or remove it")
    if "dropout" in arguments and network.network_dropout:
        raise ConfigError("--network_args dropout and --network_dropout mean the same; keep one")
    return AdapterSettings(
        method=method,
        rank=network.network_dim,
        alpha=network.network_alpha,
        conv_rank=conv_rank,
        conv_alpha=conv_alpha,
        type_ranks={
            **_left_out_by_preset(text("preset", "full"), types),
            **{name: _rank(name, arguments[name], minimum=0) for name in sorted(types) if name in arguments},
        },
        optional_ranks=_rank_list("emb_dims", arguments["emb_dims"], optional) if "emb_dims" in arguments else (),
        block_indices=_blocks("train_block_indices", text("train_block_indices", "all")),
        factor=_factor("factor", text("factor", "-1")),
        type_factors={of: _factor(name, arguments[name]) for name, of in sorted(factors.items()) if name in arguments},
        decompose_both=_boolean("decompose_both", text("decompose_both", "false")),
        full_matrix=full_matrix,
        switches=frozenset(name for name in switches if _boolean(name, text(name, "false"))),
        dropout=_number("dropout", text("dropout"), network.network_dropout, minimum=0.0, below=1.0),
        rank_dropout=_number("rank_dropout", text("rank_dropout"), 0.0, minimum=0.0, below=1.0),
        module_dropout=_number("module_dropout", text("module_dropout"), 0.0, minimum=0.0, below=1.0),
        loraplus_unet_lr_ratio=_number("loraplus_unet_lr_ratio", text("loraplus_unet_lr_ratio"), ratio, above=0.0),
        loraplus_text_encoder_lr_ratio=_number(
            "loraplus_text_encoder_lr_ratio", text("loraplus_text_encoder_lr_ratio"), ratio, above=0.0
        ),
        blocks=blocks,
        typed=frozenset(arguments),
    )


def _convolutions(
    network: NetworkConfig, arguments: Mapping[str, str], targets: Mapping[str, AdapterTargets]
) -> tuple[int | None, float]:
    """Rank (None: none) and alpha of convolutions with kernels larger than 1.

    LyCORIS changes them by default, as all other layers; a preset of its that names layers leaves them out.
    """
    rank = _rank("conv_dim", arguments["conv_dim"]) if "conv_dim" in arguments else None
    by_default = (
        network.network_module == LYCORIS
        and arguments.get("preset", "full") == "full"
        and any(target.convolutional for target in targets.values())
        and not {"conv_dim", "conv_block_dims"} & set(arguments)
        and not network.dim_from_weights
        and not network.network_train_text_encoder_only
    )
    alpha = network.network_alpha if by_default else 1.0
    return network.network_dim if by_default else rank, _number(
        "conv_alpha", arguments.get("conv_alpha"), alpha, minimum=0.0
    )


def _check_whole_factors(network: NetworkConfig, arguments: Mapping[str, str], types: set[str]) -> None:
    without_ranks = ("decompose_both", "conv_alpha", *RANK_LISTS, *ALPHA_LISTS)
    idle = [name for name in without_ranks if name in arguments]
    idle += [name for name in sorted(types) if arguments.get(name, "0") != "0"]
    if idle:
        raise ConfigError(
            f"--network_args {idle[0]} does nothing with full_matrix=true, where factors have no rank; remove one of "
            "the two"
        )
    fields = type(network).__dataclass_fields__
    for name in ("network_dim", "network_alpha"):
        if getattr(network, name) != fields[name].default:
            raise ConfigError(
                f"--{name} {getattr(network, name):g} does nothing with --network_args full_matrix=true, where factors "
                "have no rank and strength 1; remove one of the two"
            )


def _left_out_by_preset(preset: str, types: set[str]) -> dict[str, int]:
    if preset not in _PRESETS:
        raise _unexpected("preset", preset, f"{', '.join(_PRESETS)}, which choose among this model's types of layers")
    return {name: 0 for name in sorted(types) if not any(part in name for part in _PRESETS[preset])}


def _factor(name: str, text: str) -> int:
    if text == "-1":
        return -1
    if not text.isdecimal() or int(text) < 1:
        raise _unexpected(name, text, "a whole number of at least 1, or -1 for factors as equal as can be")
    return int(text)


def _check_ranks_come_from_file(arguments: Mapping[str, str], types: set[str]) -> None:
    for name in arguments:
        if name in types or name in _RANKS_BY_HAND:
            raise ConfigError(
                f"--network_args {name} does nothing with --dim_from_weights, which takes layers and ranks from the "
                "file; remove one of the two"
            )


def _number(
    name: str,
    text: str | None,
    default: float,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    if text is None:
        return default
    expected = "a number"
    expected += f" of at least {minimum:g}" if minimum is not None else f" above {above:g}"
    expected += f" and below {below:g}" if below is not None else ""
    try:
        value = float(text)
    except ValueError:
        raise _unexpected(name, text, expected) from None
    in_range = (minimum is None or value >= minimum) and (above is None or value > above)
    # Negated, so that nan is refused too.
    if not (in_range and value < (below if below is not None else float("inf"))):
        raise _unexpected(name, text, expected)
    return value


def _rank(name: str, text: str, *, minimum: int = 1) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise _unexpected(name, text, f"a whole number of at least {minimum}")
    return int(text)


def _rank_list(name: str, text: str, count: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.strip("[]()").split(",")]
    if len(parts) != count:
        raise _unexpected(name, text, f"{count} whole numbers, such as [{','.join(['4'] * count)}]")
    return tuple(_rank(name, part, minimum=0) for part in parts)


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in (*TRUE_TEXTS, *FALSE_TEXTS):
        raise _unexpected(name, text, "true or false")
    return text.lower() in TRUE_TEXTS


def _blocks(name: str, text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    if text == "none":
        return ()
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = (number.strip() for number in part.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise _unexpected(name, text, "all, none or block numbers such as 0,3-7")
        chosen.update(range(int(first), int(last) + 1))
    return tuple(sorted(chosen))


def _unexpected(name: str, text: str, expected: str) -> ConfigError:
    return ConfigError(f"--network_args {name}: expected {expected}, got {text!r}")
