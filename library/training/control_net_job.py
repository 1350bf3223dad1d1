"""Training a ControlNet beside a frozen model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from library.config.optimizer import OptimizerConfig
from library.config.run import RunConfig
from library.families.protocols import ControlNetFamily, ModelFamily
from library.training.full_model import DENOISER
from library.training.metadata import checkpoint_metadata
from library.training.model_files import write_model_files
from library.training.placing import check_placement
from library.training.precision import Precision
from library.training.run import Run

CONTROL_NET = "control_net"


class TrainedControlNet(nn.Module):
    """A ControlNet as what is trained, whole."""

    def __init__(self, control_net: nn.Module):
        super().__init__()
        self.control_net = control_net.requires_grad_(True)

    def component_parameters(self, component: str) -> list[nn.Parameter]:
        """The trained parameters of one part; none of the base model's."""
        return list(self.control_net.parameters()) if component == CONTROL_NET else []

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
        """The optimizer's one group: ``params``, ``lr`` and ``name``."""
        params = self.component_parameters(CONTROL_NET)
        return [{"params": params, "lr": optimizer.learning_rate, "name": CONTROL_NET}]


class ControlNetJob:
    """``library.training.jobs.Job`` for ControlNets."""

    def check(self, config: RunConfig, family: ModelFamily) -> tuple[str, ...]:
        """See ``Job``."""
        return (CONTROL_NET,)

    def rehearse(self, config: RunConfig, family: ModelFamily) -> nn.Module:
        """See ``Job``."""
        check_placement(config.memory, family, family.load_denoiser(device="meta", dtype=torch.float32))
        meta = torch.device("meta")
        return TrainedControlNet(self._load(config, family, device=meta, dtype=torch.float32, seed=0))

    def dtype(self, component: str, config: RunConfig, family: ModelFamily, precision: Precision) -> torch.dtype:
        """See ``Job``."""
        return precision.trained if component == CONTROL_NET else precision.frozen

    def load(
        self, config: RunConfig, family: ModelFamily, *, device: torch.device, precision: Precision, seed: int
    ) -> dict[str, nn.Module]:
        """See ``Job``: the ControlNet."""
        return {CONTROL_NET: self._load(config, family, device=device, dtype=precision.trained, seed=seed)}

    def prepare(
        self, config: RunConfig, family: ModelFamily, roots: Mapping[str, nn.Module], *, seed: int, precision: Precision
    ) -> TrainedControlNet:
        """See ``Job``: from here on the denoiser is steered."""
        roots[DENOISER].requires_grad_(False)
        cast(ControlNetFamily, family).steer(roots[DENOISER], roots[CONTROL_NET])
        return TrainedControlNet(roots[CONTROL_NET])

    def blocks(self, family: ModelFamily, trainable: TrainedControlNet) -> Sequence[nn.Module]:
        """See ``Job``."""
        return cast(ControlNetFamily, family).control_net_blocks(trainable.control_net)

    def save(self, run: Run, stem: str, done: int, dtype: torch.dtype | None, facts: Mapping[str, str]) -> list[Path]:
        """See ``Job``: one file, or a folder."""
        saving, family = run.config.saving, cast(ControlNetFamily, run.family)
        weights = run.trainable.control_net.state_dict()
        metadata = checkpoint_metadata(run, done, facts, kind="/controlnet")

        def write(path: Path) -> None:
            family.write_control_net(weights, path, metadata, layout=saving.save_model_as, dtype=dtype)

        return [write_model_files(saving, stem, "ControlNet", write)]

    def _load(
        self, config: RunConfig, family: ModelFamily, *, device: torch.device, dtype: torch.dtype, seed: int
    ) -> nn.Module:
        assert config.control_net is not None
        path = config.control_net.controlnet_model_name_or_path
        return cast(ControlNetFamily, family).load_control_net(path, seed=seed, device=device, dtype=dtype)
