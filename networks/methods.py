"""The kinds of updates that a layer can have, and how one is made from settings or from a file's numbers."""

from typing import Protocol

from torch import Tensor, nn

from networks.loha import LohaLayer, LohaWeights
from networks.lokr import LokrLayer, LokrWeights, plan_factors, plan_of
from networks.lora_layer import LoraLayer, LoraWeights
from networks.settings import AdapterSettings
from networks.targeting import TargetedLayer
from networks.wrapping import Base, Dropouts, WrappedForward, layer_size

UpdateWeights = LoraWeights | LokrWeights | LohaWeights


class UpdateLayer(Protocol):
    """One layer's update, acting on the layer from when it is made; an ``nn.Module`` whose parameters are the update.

    The update is linear in each of its parameters, so that multiplying one multiplies the update.

    Attributes:
        component: The part of the model that the layer belongs to: ``denoiser``, ``clip_l``.
        rank: Inner size of the update's factors.
        alpha: The update is multiplied by alpha / rank.
        multiplier: Strength; 1 is as trained.
        enabled: Whether it acts.
        wrapped: The layer.
    """

    component: str
    rank: int
    alpha: float
    multiplier: float
    enabled: bool
    wrapped: WrappedForward

    @property
    def parts_by_rate(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters with the plain learning rate, and those to which LoRA+ gives a larger one."""

    def initialise(self, run_seed: int, name: str) -> None:
        """This makes the update zero, with values that depend on seed and name alone."""

    def weights(self) -> UpdateWeights:
        """The numbers of the update."""

    def norm(self) -> Tensor:
        """The update's Frobenius norm at multiplier 1, ()."""


def new_layer(layer: TargetedLayer, settings: AdapterSettings) -> UpdateLayer:
    """This gives a layer the update that the settings ask for; its numbers are still to come.

    Args:
        layer: Which, with rank, alpha and factor.
        settings: The kind of update and its dropouts.
    """
    dropouts = _dropouts(settings)
    if settings.method == "lokr":
        plan = plan_factors(
            layer_size(layer.base),
            rank=layer.rank,
            factor=layer.factor,
            decompose_both=settings.decompose_both,
            full_matrix=settings.full_matrix,
        )
        return LokrLayer(layer.base, component=layer.component, plan=plan, alpha=layer.alpha, dropouts=dropouts)
    kind = LohaLayer if settings.method == "loha" else LoraLayer
    return kind(layer.base, component=layer.component, rank=layer.rank, alpha=layer.alpha, dropouts=dropouts)


def layer_for(weights: UpdateWeights, component: str, base: Base, settings: AdapterSettings) -> UpdateLayer:
    """This gives a layer an update of the kind and the sizes of ``weights``; its numbers are still to come.

    Args:
        weights: The numbers that it will have.
        component: The part of the model that the layer belongs to.
        base: The layer.
        settings: Dropouts.
    """
    dropouts = _dropouts(settings)
    if isinstance(weights, LokrWeights):
        plan = plan_of(weights, layer_size(base))
        return LokrLayer(base, component=component, plan=plan, alpha=weights.alpha, dropouts=dropouts)
    kind = LohaLayer if isinstance(weights, LohaWeights) else LoraLayer
    return kind(base, component=component, rank=weights.rank, alpha=weights.alpha, dropouts=dropouts)


def _dropouts(settings: AdapterSettings) -> Dropouts:
    return Dropouts(settings.dropout, settings.rank_dropout, settings.module_dropout)
