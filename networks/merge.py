"""Adapters added into a model's own weights, for good."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from library.records import AdapterTargets
from networks.loading import layers_by_name, match_layers, read_adapter


@torch.no_grad()
def merge(
    roots: Mapping[str, nn.Module],
    targets: Mapping[str, AdapterTargets],
    files: Sequence[str],
    multipliers: Sequence[float] = (),
    *,
    partial: bool = False,
) -> int:
    """This adds adapters to the weights: W + sum of multiplier * update.

    The sum is made in fp32 and rounded to the weights' own type once.

    Args:
        roots: The components to change, by name.
        targets: The family's, by component.
        files: Adapter files in either spelling.
        multipliers: One per file; those without one have 1.
        partial: Leave out what belongs to components that aren't in ``roots``, for callers that load one after another.

    Returns:
        How many layers changed.

    Raises:
        ConfigError: A file is not an adapter for this model, or changes components that aren't in ``roots``.
    """
    strengths = (*multipliers, *[1.0] * (len(files) - len(multipliers)))
    layers = layers_by_name(roots, targets)
    sums: dict[str, torch.Tensor] = {}
    for path, strength in zip(files, strengths):
        weights = read_adapter(path, targets)
        for layer in match_layers(weights, layers, roots, targets, path, partial=partial):
            base = layer.base.weight
            delta = weights[layer.name].delta().to(base.device).reshape(base.shape)
            sums[layer.name] = sums.get(layer.name, base.float()) + strength * delta
    for name, weight in sums.items():
        layers[name].base.weight.copy_(weight)
    return len(sums)
