"""The optimizer's parameter groups of an adapter: what has a learning rate of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from library.config.optimizer import OptimizerConfig
from library.records import AdapterTargets
from networks.methods import UpdateLayer
from networks.settings import AdapterSettings
from networks.targeting import DENOISER, blocks_by_name, learning_rates


def parameter_groups(
    layers: Mapping[str, UpdateLayer],
    targets: Mapping[str, AdapterTargets],
    settings: AdapterSettings,
    optimizer: OptimizerConfig,
) -> list[dict[str, Any]]:
    """This makes the optimizer's groups: one per component, and with LoRA+ another for its ``up`` weights.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) gives ``up`` a larger learning rate than ``down``. Where blocks have
    learning rates of their own, each block has its groups.

    Args:
        layers: The adapter's updates by name.
        targets: The family's, by component.
        settings: Ratios of LoRA+, learning rates of blocks.
        optimizer: The learning rates.

    Returns:
        ``params``, ``lr`` and ``name`` per group: ``unet``, ``unet plus``, ``unet block 4``, ``textencoder 1``, ...

    Raises:
        ValueError: A component's learning rate is 0. It should have got no adapter.
    """
    rates = learning_rates(optimizer, targets)
    encoders = [component for component in targets if component != DENOISER]
    groups = []
    for component in dict.fromkeys(layer.component for layer in layers.values()):
        rate = rates[component]
        if rate <= 0:
            raise ValueError(f"{component} has learning rate {rate:g}, so it should not have an adapter")
        of_encoder = component != DENOISER
        name = f"textencoder {encoders.index(component) + 1}" if of_encoder else "unet"
        ratio = settings.loraplus_text_encoder_lr_ratio if of_encoder else settings.loraplus_unet_lr_ratio
        own = {name: layer for name, layer in layers.items() if layer.component == component}
        for of_block, factor, layers_of_block in _by_block(own, targets[component], settings):
            groups += _by_speed(layers_of_block, name + of_block, rate * factor, ratio)
    return groups


def _by_block(
    layers: Mapping[str, UpdateLayer], target: AdapterTargets, settings: AdapterSettings
) -> list[tuple[str, float, list[UpdateLayer]]]:
    """A component's layers by learning rate: end of the group's name, factor of the rate, layers."""
    rates, blocks = settings.blocks.rates, blocks_by_name(target)
    if not rates or not blocks:
        return [("", 1.0, list(layers.values()))]
    parts = [("", 1.0, [layer for name, layer in layers.items() if name not in blocks])]
    for number, rate in enumerate(rates):
        own = [layer for name, layer in layers.items() if blocks.get(name) == number]
        parts.append((f" block {number}", rate, own))
    return [part for part in parts if part[2]]


def _by_speed(layers: Sequence[UpdateLayer], name: str, rate: float, ratio: float) -> list[dict[str, Any]]:
    down, up = ([p for layer in layers for p in layer.parts_by_rate[faster]] for faster in (0, 1))
    if ratio == 1:
        return [{"params": [*down, *up], "lr": rate, "name": name}]
    return [
        {"params": down, "lr": rate, "name": name},
        {"params": up, "lr": rate * ratio, "name": f"{name} plus"},
    ]
