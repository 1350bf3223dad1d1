"""From options or files to an adapter on the model."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from library.config.errors import ConfigError
from library.config.network import METHODS, NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.io.header import read_header
from library.io.safetensors import load_tensors
from library.records import AdapterTargets
from networks.key_formats import DIFFUSERS, KOHYA, components_of, detect_format, read_weights
from networks.lora import AdapterNetwork, attach, inject, size_metadata
from networks.methods import UpdateWeights
from networks.settings import AdapterSettings, read_settings
from networks.targeting import TargetedLayer, all_layers, left_out, trained_components
from networks.wrapping import weight_shape

if TYPE_CHECKING:
    from library.config.run import RunConfig

log = logging.getLogger(__name__)


def check_network(
    network: NetworkConfig, optimizer: OptimizerConfig, targets: Mapping[str, AdapterTargets]
) -> tuple[str, ...]:
    """This finds what is wrong with the adapter's options before any model is loaded; files are read by their headers.

    Args:
        network: The adapter's options.
        optimizer: The learning rates.
        targets: The family's, by component.

    Returns:
        The components that will be trained.

    Raises:
        ConfigError: Something can't work.
    """
    settings = read_settings(network, targets)
    components = trained_components(network, settings, optimizer, targets)
    homeless = [component for component in components if not targets[component].diffusers_prefix]
    if network.save_format != "kohya" and homeless:
        raise ConfigError(
            f"--save_format {network.save_format}: diffusers has no place for an adapter of {homeless[0]}; use "
            "--save_format kohya, or don't train it"
        )
    for path in (*network.base_weights, *([network.network_weights] if network.network_weights else [])):
        detect_format(read_header(path).tensors, targets, str(path))
    return components


def create_network(
    config: "RunConfig", roots: Mapping[str, nn.Module], targets: Mapping[str, AdapterTargets], run_seed: int
) -> AdapterNetwork:
    """This puts the adapter that the user asked for on the model.

    Components whose learning rate is 0 get none: they would be saved without having learned anything.

    Args:
        config: Groups ``network`` and ``optimizer``.
        roots: The components that are loaded, by name. Those that aren't trained are left alone.
        targets: The family's, by component.
        run_seed: Decides the first values.

    Raises:
        ConfigError: The options can't work, or a component to train isn't loaded.
    """
    network = config.network
    assert network is not None, "this run trains no adapter"
    settings = read_settings(network, targets)
    components = check_network(network, config.optimizer, targets)
    if missing := [component for component in components if component not in roots]:
        raise ConfigError(
            f"the adapter would train {', '.join(missing)}, which this run doesn't load: its file isn't given, "
            "or its outputs are cached; change that, or add --network_train_unet_only"
        )
    created = _create(network, settings, {component: roots[component] for component in components}, targets, run_seed)
    if network.save_format != KOHYA:
        created.refuse_full_rank()
    return created


def _create(
    network: NetworkConfig,
    settings: AdapterSettings,
    trained: Mapping[str, nn.Module],
    targets: Mapping[str, AdapterTargets],
    run_seed: int,
) -> AdapterNetwork:
    metadata = {"ss_network_args": network.network_args_json} if network.network_args else {}
    if network.network_weights is None:
        return inject(trained, targets, settings, run_seed=run_seed, metadata=metadata)
    if network.dim_from_weights:
        created = _from_file(network.network_weights, trained, targets, settings, metadata, partial=True)
        _check_kind(created, settings, network.network_weights)
        if without := [component for component in trained if component not in created.components]:
            log.warning("%s has nothing for %s, which get no adapter", network.network_weights, ", ".join(without))
        return created
    created = inject(trained, targets, settings, run_seed=run_seed, metadata=metadata)
    _start_from(created, network.network_weights, trained, targets)
    return created


def load_adapter(
    path: str,
    roots: Mapping[str, nn.Module],
    targets: Mapping[str, AdapterTargets],
    multiplier: float = 1.0,
    *,
    partial: bool = False,
) -> AdapterNetwork:
    """This puts a saved adapter on the model, for making pictures: frozen and in eval mode.

    Ranks and alphas are the file's.

    Args:
        path: The file, in either spelling.
        roots: The components that are loaded, by name.
        targets: The family's, by component.
        multiplier: Strength; 1 is as trained.
        partial: Leave out what belongs to components that aren't in ``roots``, for callers that load one after another.
            See ``adapter_components``.

    Raises:
        ConfigError: The file is not an adapter for this model, or changes components that aren't in ``roots``.
    """
    settings = AdapterSettings(rank=1, alpha=0.0)
    network = _from_file(path, roots, targets, settings, {}, partial=partial)
    network.set_multiplier(multiplier)
    return network.eval().requires_grad_(False)


def adapter_components(path: str, targets: Mapping[str, AdapterTargets]) -> set[str]:
    """The components that an adapter file changes, from its header alone.

    Raises:
        ConfigError: The file is not an adapter for this model.
    """
    keys = read_header(path).tensors
    if detect_format(keys, targets, str(path)) == DIFFUSERS:
        prefixes = {key.split(".")[0] for key in keys}
        return {component for component, target in targets.items() if target.diffusers_prefix in prefixes}
    return components_of(keys, targets)


def read_adapter(path: str, targets: Mapping[str, AdapterTargets]) -> dict[str, UpdateWeights]:
    """This reads an adapter file in either spelling.

    Returns:
        By layer name in kohya's spelling, on the CPU.

    Raises:
        ConfigError: The file is not a readable adapter for this model.
    """
    header = read_header(path)
    detect_format(header.tensors, targets, str(path))
    return read_weights(dict(load_tensors(header)), header.metadata, targets, str(path))


def layers_by_name(roots: Mapping[str, nn.Module], targets: Mapping[str, AdapterTargets]) -> dict[str, TargetedLayer]:
    """Every layer of the model that could have an adapter, by name in kohya's spelling."""
    layers = (TargetedLayer(name, component, base, 0, 0.0) for name, component, _, base in all_layers(roots, targets))
    return {layer.name: layer for layer in layers}


def match_layers(
    weights: Mapping[str, UpdateWeights],
    layers: Mapping[str, TargetedLayer],
    roots: Mapping[str, nn.Module],
    targets: Mapping[str, AdapterTargets],
    source: str,
    *,
    partial: bool,
) -> list[TargetedLayer]:
    """This finds the layers that a file's weights are for, with the file's ranks and alphas.

    Args:
        weights: By name.
        layers: All layers of ``roots``, by name.
        roots: The components that are loaded.
        targets: The family's, by component.
        source: The file, for errors.
        partial: Leave out what belongs to components that aren't in ``roots``.

    Raises:
        ConfigError: A layer isn't in the model, has another size, or belongs to a component that isn't loaded.
    """
    absent = components_of(weights, targets) - set(roots)
    if absent and not partial:
        raise ConfigError(
            f"{source} also changes {', '.join(sorted(absent))}, which this run doesn't load at this point"
        )
    here = {name: given for name, given in weights.items() if not components_of([name], targets) & absent}
    if unknown := sorted(set(here) - set(layers)):
        raise ConfigError(
            f"{source} is for another model: {len(unknown)} of its {len(weights)} layers don't exist here, such as "
            f"{', '.join(unknown[:3])}"
        )
    for name, given in here.items():
        expected, found = weight_shape(layers[name].base), given.shape
        # A convolution's kernel may be laid out flat.
        if found != expected and found != (expected[0], math.prod(expected[1:])):
            raise ConfigError(
                f"{source} is for another model: {name} changes a weight of size {list(found)}, here it has "
                f"{list(expected)}"
            )
    return [replace(layers[name], rank=here[name].rank, alpha=here[name].alpha) for name in layers if name in here]


def _from_file(
    path: str,
    roots: Mapping[str, nn.Module],
    targets: Mapping[str, AdapterTargets],
    settings: AdapterSettings,
    metadata: Mapping[str, str],
    *,
    partial: bool,
) -> AdapterNetwork:
    weights = read_adapter(path, targets)
    matched = match_layers(weights, layers_by_name(roots, targets), roots, targets, path, partial=partial)
    without = left_out(targets, settings)
    layers = [layer for layer in matched if layer.name not in without]
    if not layers:
        raise ConfigError(f"{path} has nothing for {', '.join(roots)}")
    used = {layer.name: weights[layer.name] for layer in layers}
    network = attach(layers, used, targets, settings, metadata={**metadata, **size_metadata(list(used.values()))})
    network.load_weights(used, path)
    if not next(network.parameters()).is_meta:  # a trial without weights says nothing
        _report(path, used=len(used), in_file=len(weights), without=0)
    return network


def _check_kind(network: AdapterNetwork, settings: AdapterSettings, path: str) -> None:
    for layer in network.modules_by_name.values():
        found = layer.weights().method
        if found != METHODS[settings.method]:
            raise ConfigError(
                f"--network_weights {path} is a {found}, and --network_module says {METHODS[settings.method]}; with "
                f"--dim_from_weights it must be networks.{found.lower()}"
            )


def _start_from(
    network: AdapterNetwork, path: str, roots: Mapping[str, nn.Module], targets: Mapping[str, AdapterTargets]
) -> None:
    weights = read_adapter(path, targets)
    match_layers(weights, layers_by_name(roots, targets), roots, targets, path, partial=True)
    own = network.modules_by_name
    used = {name: given for name, given in weights.items() if name in own}
    if not used:
        raise ConfigError(f"--network_weights {path} has nothing for the layers that this run trains")
    network.load_weights(used, path)
    if not next(network.parameters()).is_meta:
        _report(path, used=len(used), in_file=len(weights), without=len(own) - len(used))


def _report(path: str, *, used: int, in_file: int, without: int) -> None:
    log.info("%s: %d layers loaded", path, used)
    if used < in_file:
        log.warning(
            "%s: %d of its %d layers are left out, as this run doesn't change them", path, in_file - used, in_file
        )
    if without:
        log.warning("%s has nothing for %d layers of this adapter; they start at zero", path, without)
