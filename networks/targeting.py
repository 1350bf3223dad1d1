"""Which layers get an adapter, under which name and of which rank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from library.config.errors import ConfigError
from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.records import AdapterTargets
from networks.settings import AdapterSettings, factor_name

Number = TypeVar("Number", int, float)

DENOISER = "denoiser"
DEFAULT_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class TargetedLayer:
    """One layer that gets an adapter.

    Attributes:
        name: Of the adapter's keys, kohya's spelling: ``lora_unet_joint_blocks_0_x_block_attn_qkv``.
        component: The part of the model: ``denoiser``.
        base: The layer.
        rank: Of the update.
        alpha: Of the update; 0 means the rank.
        factor: LoKr's: what one side of the Kronecker product should be; -1 makes both as equal as can be.
    """

    name: str
    component: str
    base: nn.Linear | nn.Conv2d
    rank: int
    alpha: float
    factor: int = -1


def kohya_name(prefix: str, path: str) -> str:
    """The name of an adapter's keys for the layer at ``path``. It can't be inverted: paths contain underscores."""
    return f"{prefix}_{path.replace('.', '_')}"


def layer_name(target: AdapterTargets, path: str) -> str:
    """The name of an adapter's keys for the layer at our module path ``path``."""
    return kohya_name(target.prefix, target.key_paths.get(path, path))


def block_of(target: AdapterTargets, path: str) -> int | None:
    """The number of the block that a layer stands in; None outside the blocks."""
    if target.block_prefix is not None and path.startswith(f"{target.block_prefix}."):
        return int(path[len(target.block_prefix) + 1 :].split(".")[0])
    blocks = (number for number, block in enumerate(way_blocks(target)) if path.startswith(f"{block}."))
    return next(blocks, None)


def way_blocks(target: AdapterTargets) -> list[str]:
    """The paths of a U-Net's blocks, in forward order; empty for other models."""
    return [block for blocks in target.ways.values() for block in blocks]


def blocks_by_name(target: AdapterTargets) -> dict[str, int]:
    """The layers in a U-Net's blocks: name of their keys -> number of the block."""
    blocks = {layer_name(target, path): block_of(target, path) for path in target.key_paths} if target.ways else {}
    return {name: block for name, block in blocks.items() if block is not None}


def left_out(targets: Mapping[str, AdapterTargets], settings: AdapterSettings) -> set[str]:
    """The names of the layers whose block has the learning rate 0."""
    rates = settings.blocks.rates
    blocks = [entry for target in targets.values() for entry in blocks_by_name(target).items()] if rates else []
    return {name for name, block in blocks if rates[block] == 0}


def learning_rates(optimizer: OptimizerConfig, targets: Mapping[str, AdapterTargets]) -> dict[str, float]:
    """The learning rate of each component's adapter.

    Args:
        optimizer: The options.
        targets: The family's, by component; text encoders in the order of ``--text_encoder_lr``.

    Raises:
        ConfigError: There are more rates than text encoders.
    """
    base = DEFAULT_LEARNING_RATE if optimizer.learning_rate is None else optimizer.learning_rate
    encoders = [component for component in targets if component != DENOISER]
    given = optimizer.text_encoder_lr or (base,)
    if len(given) > max(len(encoders), 1):
        raise ConfigError(
            f"--text_encoder_lr has {len(given)} values, but this model's text encoders are {', '.join(encoders)}"
        )
    rates = {component: given[min(i, len(given) - 1)] for i, component in enumerate(encoders)}
    return {DENOISER: base if optimizer.unet_lr is None else optimizer.unet_lr, **rates}


def trained_components(
    network: NetworkConfig, settings: AdapterSettings, optimizer: OptimizerConfig, targets: Mapping[str, AdapterTargets]
) -> tuple[str, ...]:
    """The components that get an adapter: those that are wanted, switched on and have a learning rate above 0.

    Raises:
        ConfigError: None is left, or a setting for a component does nothing.
    """
    rates = learning_rates(optimizer, targets)
    chosen = []
    for component, target in targets.items():
        wanted = not (
            network.network_train_unet_only if component != DENOISER else network.network_train_text_encoder_only
        )
        switched_on = target.enabled_by is None or target.enabled_by in settings.switches
        if target.enabled_by and switched_on and not wanted:
            raise ConfigError(
                f"--network_args {target.enabled_by} does nothing with --network_train_unet_only; remove one of the two"
            )
        if target.enabled_by and switched_on and rates[component] == 0:
            raise ConfigError(
                f"--network_args {target.enabled_by} does nothing with a learning rate of 0 in --text_encoder_lr; "
                "remove it or raise the rate"
            )
        if wanted and switched_on and rates[component] > 0:
            chosen.append(component)
    _check_own_rates(optimizer, targets, settings)
    if not chosen:
        raise ConfigError(
            "nothing is left to train: every component is excluded or has learning rate 0; check --learning_rate, "
            "--unet_lr and --text_encoder_lr"
        )
    return tuple(chosen)


def _check_own_rates(
    optimizer: OptimizerConfig, targets: Mapping[str, AdapterTargets], settings: AdapterSettings
) -> None:
    encoders = [component for component in targets if component != DENOISER]
    for component, rate in zip(encoders, optimizer.text_encoder_lr or ()):
        switch = targets[component].enabled_by
        if rate > 0 and switch and switch not in settings.switches:
            raise ConfigError(
                f"--text_encoder_lr {rate:g} for {component} does nothing: it gets no adapter without --network_args "
                f"{switch}=true. Add it, or give 0"
            )


def all_layers(
    roots: Mapping[str, nn.Module], targets: Mapping[str, AdapterTargets]
) -> Iterator[tuple[str, str, str, nn.Linear | nn.Conv2d]]:
    """This goes through every layer that could have an adapter: name, component, path, layer."""
    for component, root in roots.items():
        for path, module in root.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and path:
                yield layer_name(targets[component], path), component, path, module


def select_layers(
    roots: Mapping[str, nn.Module], targets: Mapping[str, AdapterTargets], settings: AdapterSettings
) -> list[TargetedLayer]:
    """This chooses the layers by the family's targets and the user's settings.

    Args:
        roots: The components to change, by name.
        targets: The family's, by component.
        settings: Ranks, types and blocks.

    Raises:
        ConfigError: A setting applies to no layer, or no layer is chosen.
    """
    _check_blocks(roots, targets, settings)
    acted: set[str] = set()
    layers = []
    for name, component, path, module in all_layers(roots, targets):
        rank, alpha = _rank(path, module, targets[component], settings, acted)
        factor = _factor(path, targets[component], settings, acted)
        if rank:
            layers.append(TargetedLayer(name, component, module, rank, alpha, factor))
    given = {*settings.type_ranks, *(factor_name(name) for name in settings.type_factors)}
    idle = {*given, *(settings.typed & {"conv_dim"})} - acted
    if idle:
        raise ConfigError(
            f"--network_args {', '.join(sorted(idle))} does nothing: no layer that gets an adapter is of that type; "
            "remove it"
        )
    if settings.optional_ranks and not any(targets[component].optional for component in roots):
        raise ConfigError("--network_args emb_dims does nothing: the denoiser gets no adapter; remove it")
    missing = [component for component in roots if not any(layer.component == component for layer in layers)]
    if missing:
        raise ConfigError(f"the adapter's settings leave no layer of {missing[0]}; change --network_args")
    names = [layer.name for layer in layers]
    assert len(set(names)) == len(names), "two layers share a name"
    return layers


def _rank(
    path: str, module: nn.Module, target: AdapterTargets, settings: AdapterSettings, acted: set[str]
) -> tuple[int, float]:
    """Rank (0: no adapter) and alpha of one layer; notes in ``acted`` which settings applied."""
    if _matches(path, target.exclude):
        return 0, 0.0
    block = block_of(target, path)
    of_block = None if block is None or not target.ways else block
    if of_block is not None and settings.blocks.rates and settings.blocks.rates[of_block] == 0:
        return 0, 0.0
    added = settings.has_convolutions and _matches(path, target.convolutional)
    if not added and not _matches(path, target.include):
        ranks = zip(target.optional, settings.optional_ranks)
        return next((rank for globs, rank in ranks if _matches(path, globs)), 0), settings.alpha
    # First the types, so that a setting counts as acting even where the choice of blocks leaves the layer out.
    types = [name for name, globs in target.dims.items() if name in settings.type_ranks and _matches(path, globs)]
    acted.update(types)
    if settings.block_indices is not None and block not in (None, *settings.block_indices):
        return 0, 0.0
    if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
        acted.add("conv_dim")
        return _of_block(settings.blocks.conv_ranks, of_block, settings.conv_rank or 0), _of_block(
            settings.blocks.conv_alphas, of_block, settings.conv_alpha
        )
    rank = settings.type_ranks[types[0]] if types else _of_block(settings.blocks.ranks, of_block, settings.rank)
    return rank, _of_block(settings.blocks.alphas, of_block, settings.alpha)


def _of_block(given: Sequence[Number], block: int | None, else_: Number) -> Number:
    return else_ if block is None or not given else given[block]


def _factor(path: str, target: AdapterTargets, settings: AdapterSettings, acted: set[str]) -> int:
    """LoKr's factor of one layer; notes in ``acted`` which settings applied."""
    for name, factor in settings.type_factors.items():
        if _matches(path, target.dims.get(name, ())):
            acted.add(factor_name(name))
            return factor
    return settings.factor


def _matches(path: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(path, glob) for glob in globs)


def _check_blocks(
    roots: Mapping[str, nn.Module], targets: Mapping[str, AdapterTargets], settings: AdapterSettings
) -> None:
    counts = {component: _block_count(root, targets[component]) for component, root in roots.items()}
    named = [*(["train_block_indices"] if settings.block_indices is not None else []), *settings.blocks.names]
    if named and not any(counts.values()):
        raise ConfigError(f"--network_args {named[0]} does nothing: no component with blocks gets an adapter")
    if settings.block_indices is None:
        return
    for component, count in counts.items():
        if count and max(settings.block_indices, default=0) >= count:
            raise ConfigError(
                f"--network_args train_block_indices names block {max(settings.block_indices)}, but {component} has "
                f"blocks 0 to {count - 1}"
            )


def _block_count(root: nn.Module, target: AdapterTargets) -> int:
    if target.block_prefix is not None:
        return len(root.get_submodule(target.block_prefix))  # type: ignore[arg-type]
    return len(way_blocks(target))
