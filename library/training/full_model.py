"""The model's own weights as what is trained."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from library.config.optimizer import OptimizerConfig

DENOISER = "denoiser"


class FullModel(nn.Module):
    """The denoiser and perhaps text encoders, trained whole.

    Args:
        components: By name: ``denoiser``, and text encoders. All their parameters are trained.
        text_encoders: The text encoders that the family can train, in their order; not all need be trained.
    """

    def __init__(self, components: Mapping[str, nn.Module], text_encoders: tuple[str, ...] = ()):
        super().__init__()
        self._text_encoders = text_encoders
        for name, component in components.items():
            self.add_module(name, component.requires_grad_(True))

    @property
    def components(self) -> dict[str, nn.Module]:
        """What is trained, by name."""
        return dict(self.named_children())

    def component_parameters(self, component: str) -> list[nn.Parameter]:
        """The trained parameters of one part of the model; none if it is not trained."""
        return list(self.components[component].parameters()) if component in self.components else []

    def component_weights(self) -> dict[str, dict[str, Tensor]]:
        """The state dict of each component, by its name."""
        return {name: component.state_dict() for name, component in self.components.items()}

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
        """This makes the optimizer's groups, one per component.

        Args:
            optimizer: The learning rates.

        Returns:
            ``params``, ``lr`` and ``name`` per group: ``unet``, ``textencoder 1``, ...
        """
        rates = text_encoder_rates(self._text_encoders, optimizer)
        groups = []
        for name in self.components:
            title = "unet" if name == DENOISER else f"textencoder {self._text_encoders.index(name) + 1}"
            rate = optimizer.learning_rate if name == DENOISER else rates[name]
            groups.append({"params": self.component_parameters(name), "lr": rate, "name": title})
        return groups


def text_encoder_rates(names: tuple[str, ...], optimizer: OptimizerConfig) -> dict[str, float]:
    """The learning rate of each text encoder: its own, the one for all, or the denoiser's."""
    assert optimizer.learning_rate is not None
    given = optimizer.text_encoder_lr or (optimizer.learning_rate,)
    rates = given if len(given) > 1 else given * len(names)
    return dict(zip(names, rates))
