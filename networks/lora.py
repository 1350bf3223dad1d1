"""An adapter: many layers' updates as one module that is trained, saved and switched off together."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.config.optimizer import OptimizerConfig
from library.records import AdapterTargets
from networks.key_formats import KOHYA, to_diffusers, to_kohya
from networks.lokr import LokrLayer
from networks.lora_layer import LoraWeights
from networks.methods import UpdateLayer, UpdateWeights, layer_for, new_layer
from networks.parameter_groups import parameter_groups
from networks.settings import AdapterSettings
from networks.targeting import TargetedLayer, select_layers

# A file's alpha may have been rounded to bf16.
_ALPHA_TOLERANCE = 0.01


class WeightNorms(NamedTuple):
    """What ``scale_weight_norms`` did, as tensors (), so that nobody waits for the device.

    Attributes:
        scaled: How many layers were above the limit.
        mean: Mean norm of the layers' updates, afterwards.
        largest: Largest norm, afterwards.
    """

    scaled: Tensor
    mean: Tensor
    largest: Tensor


class AdapterNetwork(nn.Module):
    """The adapter of a model. Its state dict holds the updates alone, in kohya's key names without the alphas.

    Args:
        layers: The updates by name in kohya's spelling; they act already.
        targets: The family's, by component.
        settings: Learning-rate ratios.
        metadata: Entries for saved files that describe the adapter.
    """

    def __init__(
        self,
        layers: Mapping[str, UpdateLayer],
        targets: Mapping[str, AdapterTargets],
        settings: AdapterSettings,
        metadata: Mapping[str, str],
    ):
        super().__init__()
        self.targets = targets
        self.settings = settings
        self.metadata = dict(metadata)
        for name, layer in layers.items():
            self.add_module(name, layer)  # type: ignore[arg-type]

    @property
    def modules_by_name(self) -> dict[str, UpdateLayer]:
        """The updates by name in kohya's spelling, in the order of the model's layers."""
        return dict(self.named_children())  # type: ignore[arg-type]

    @property
    def components(self) -> tuple[str, ...]:
        """The parts of the model that have an adapter."""
        return tuple(dict.fromkeys(layer.component for layer in self.modules_by_name.values()))

    def component_parameters(self, component: str) -> list[nn.Parameter]:
        """The parameters that change one part of the model; none if it has no adapter."""
        layers = (layer for layer in self.modules_by_name.values() if layer.component == component)
        return [parameter for layer in layers for parts in layer.parts_by_rate for parameter in parts]

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
        """The optimizer's groups; see ``networks.parameter_groups``."""
        return parameter_groups(self.modules_by_name, self.targets, self.settings, optimizer)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is exactly the base model.

        With gradient checkpointing, a backward pass outside would recompute with the adapter: use it under no_grad.
        """
        layers = self.modules_by_name.values()
        before = [layer.enabled for layer in layers]
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer, enabled in zip(layers, before):
                layer.enabled = enabled

    def set_multiplier(self, multiplier: float) -> None:
        """This sets the strength of all updates; 1 is as trained."""
        for layer in self.modules_by_name.values():
            layer.multiplier = multiplier

    def remove(self) -> None:
        """This takes the adapter off the model for good. Several on one model come off last one first.

        Raises:
            ValueError: Something else has wrapped a layer since.
        """
        for layer in self.modules_by_name.values():
            layer.wrapped.remove()

    @torch.no_grad()
    def scale_weight_norms(self, limit: float) -> WeightNorms:
        """This scales down every update whose Frobenius norm (at multiplier 1) is above ``limit``.

        Each of a layer's parameters takes the same share of the factor: half for LoRA's two.
        """
        layers = list(self.modules_by_name.values())
        norms = torch.stack([layer.norm() for layer in layers])
        factors = limit / norms.clamp(min=limit)
        for layer, factor in zip(layers, factors.unbind()):
            parameters = [parameter for parts in layer.parts_by_rate for parameter in parts]
            for parameter in parameters:
                parameter.mul_(factor ** (1 / len(parameters)))
        limited = norms.clamp(max=limit)
        return WeightNorms((norms > limit).sum(), limited.mean(), limited.max())

    def weights(self) -> dict[str, UpdateWeights]:
        """The numbers of all updates, by name in kohya's spelling."""
        return {name: layer.weights() for name, layer in self.modules_by_name.items()}

    def state_dict_kohya(self) -> dict[str, Tensor]:
        """The adapter in kohya's spelling, alphas included."""
        return to_kohya(self.weights())

    def as_lora(self) -> dict[str, LoraWeights]:
        """The same updates as a LoRA, for readers that know no other kind, by name in kohya's spelling.

        Raises:
            ConfigError: An update's rank is that of the whole layer.
        """
        self.refuse_full_rank()
        return {name: layer.weights().as_lora(layer.wrapped.kernel) for name, layer in self.modules_by_name.items()}

    def refuse_full_rank(self) -> None:
        """This checks that ``as_lora`` works.

        Raises:
            ConfigError: An update's rank is that of the whole layer.
        """
        whole = [name for name, layer in self.modules_by_name.items() if layer.weights().lora_rank is None]
        if whole:
            raise ConfigError(
                f"diffusers reads only LoRA, and {len(whole)} layers of this LoKr, such as {whole[0]}, have a whole "
                "second factor, with which they would be larger than the model as a LoRA; use --save_format kohya, or "
                "a smaller --network_dim"
            )

    def files(self, save_format: str) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """This spells the adapter for saving.

        Args:
            save_format: ``kohya``, ``diffusers`` or ``both``.

        Returns:
            By the suffix of the file's name: tensors, and metadata entries that must go into the file.
        """
        if save_format == KOHYA:
            return {"": (self.state_dict_kohya(), self.metadata)}
        tensors, metadata = to_diffusers(self.as_lora(), self.targets)
        diffusers = (tensors, {**self.metadata, **metadata})
        if save_format == "both":
            return {"": (self.state_dict_kohya(), self.metadata), "_diffusers": diffusers}
        return {"": diffusers}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, UpdateWeights], source: str) -> None:
        """This takes over the numbers of the layers in ``weights``; other layers stay as they are.

        Args:
            weights: By name; all of them must be layers of this adapter.
            source: Where they come from, for errors.

        Raises:
            ConfigError: A shape, rank or alpha differs.
        """
        layers = self.modules_by_name
        own = {name: layers[name].weights() for name in weights}
        _check_kind({name: (given.method, own[name].method) for name, given in weights.items()}, source)
        for name, given in weights.items():
            if given.tensors().keys() != own[name].tensors().keys():
                _check_parts(name, given, own[name], source)
        ranks = {name: (given.rank, own[name].rank) for name, given in weights.items()}
        _check_equal("rank", "network_dim", {name: pair for name, pair in ranks.items() if pair[0] != pair[1]}, source)
        alphas = {name: (given.alpha, own[name].alpha) for name, given in weights.items()}
        different = {name: (a, b) for name, (a, b) in alphas.items() if abs(a - b) > _ALPHA_TOLERANCE * b}
        _check_equal("alpha", "network_alpha", different, source)
        for name, given in weights.items():
            _check_parts(name, given, own[name], source)
            for part, value in own[name].tensors().items():
                value.copy_(given.tensors()[part].reshape(value.shape))


def inject(
    roots: Mapping[str, nn.Module],
    targets: Mapping[str, AdapterTargets],
    settings: AdapterSettings,
    *,
    run_seed: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> AdapterNetwork:
    """This gives every targeted layer of ``roots`` an update that is zero at first.

    Args:
        roots: The components to change, by name; they should be frozen.
        targets: The family's, by component.
        settings: Ranks, types, blocks, dropouts.
        run_seed: Of the run; with a layer's name it decides the layer's first ``down``.
        metadata: Entries for saved files that describe the adapter.

    Raises:
        ConfigError: A setting applies to no layer.
    """
    updates = {layer.name: new_layer(layer, settings) for layer in select_layers(roots, targets, settings)}
    _check_factors(updates, settings)
    network = AdapterNetwork(updates, targets, settings, metadata or {})
    for name, layer in network.modules_by_name.items():
        layer.initialise(run_seed, name)
    return network


def attach(
    layers: Iterable[TargetedLayer],
    weights: Mapping[str, UpdateWeights],
    targets: Mapping[str, AdapterTargets],
    settings: AdapterSettings,
    *,
    metadata: Mapping[str, str] | None = None,
) -> AdapterNetwork:
    """This gives layers the updates of a file, numbers still to come (``load_weights``).

    Args:
        layers: Which layers.
        weights: The file's, by layer name; they decide kinds and sizes.
        targets: The family's, by component.
        settings: Dropouts and learning-rate ratios.
        metadata: Entries for saved files that describe the adapter.
    """
    updates = {layer.name: layer_for(weights[layer.name], layer.component, layer.base, settings) for layer in layers}
    return AdapterNetwork(updates, targets, settings, metadata or {})


def size_metadata(weights: Sequence[UpdateWeights]) -> dict[str, str]:
    """What saved files say of an adapter whose ranks came from a file: kohya writes ``Dynamic`` where they differ."""
    ranks, alphas = {layer.rank for layer in weights}, {layer.alpha for layer in weights}
    return {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }


def _check_factors(updates: Mapping[str, UpdateLayer], settings: AdapterSettings) -> None:
    """This refuses what does nothing because of how the layers' sizes divide."""
    plans = [layer.plan for layer in updates.values() if isinstance(layer, LokrLayer)]
    if not plans:
        return
    if settings.decompose_both and all(plan.w1_rank is None for plan in plans):
        raise ConfigError(
            f"--network_args decompose_both does nothing: at rank {settings.rank} every layer's first factor is whole; "
            "lower --network_dim or --network_args factor, or remove it"
        )
    strength_one = (0.0, 1.0, float(settings.rank))
    if all(plan.is_whole for plan in plans) and settings.alpha not in strength_one:
        raise ConfigError(
            f"--network_alpha {settings.alpha:g} does nothing: at rank {settings.rank} every layer's factors are whole "
            "and have strength 1; remove it, or lower --network_dim"
        )


def _check_kind(methods: Mapping[str, tuple[str, str]], source: str) -> None:
    for name, (given, own) in methods.items():
        if given != own:
            raise ConfigError(
                f"{source} is a {given} adapter where this run trains a {own} ({name}); set --network_module "
                f"networks.{given.lower()}"
            )


def _check_parts(name: str, given: UpdateWeights, own: UpdateWeights, source: str) -> None:
    expected = {part: list(tensor.flatten(1).shape) for part, tensor in own.tensors().items()}
    found = {part: list(tensor.flatten(1).shape) for part, tensor in given.tensors().items()}
    if found != expected:
        sizes = ", ".join(f"{part} {size}" for part, size in found.items())
        wanted = ", ".join(f"{part} {size}" for part, size in expected.items())
        raise ConfigError(
            f"{source} has {sizes} for {name}, this run has {wanted}; give the --network_args that it was made with, "
            "or add --dim_from_weights"
        )


def _check_equal(what: str, option: str, different: Mapping[str, tuple[float, float]], source: str) -> None:
    if not different:
        return
    name, (given, own) = next(iter(different.items()))
    raise ConfigError(
        f"{source} has {what} {given:g} where this run has {own:g} ({name}, and {len(different) - 1} more layers); set "
        f"--{option} {given:g}, or add --dim_from_weights"
    )
