"""Training an adapter on a frozen model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.families.protocols import ModelFamily
from library.io.safetensors import save_tensors
from library.training.metadata import checkpoint_metadata, tensor_hash
from library.training.placing import check_placement
from library.training.precision import Precision
from library.training.run import Run
from networks.loading import (
    adapter_components,
    check_network,
    create_network,
    layers_by_name,
    match_layers,
    read_adapter,
)
from networks.targeting import DENOISER


class AdapterJob:
    """``library.training.jobs.Job`` for adapters."""

    def check(self, config: RunConfig, family: ModelFamily) -> tuple[str, ...]:
        """See ``Job``."""
        assert config.network is not None
        return check_network(config.network, config.optimizer, family.adapter_targets)

    def rehearse(self, config: RunConfig, family: ModelFamily) -> nn.Module:
        """See ``Job``: ``--base_weights`` are merged too."""
        assert config.network is not None
        targets = family.adapter_targets
        changed = set(self.check(config, family))
        changed = changed.union(*(adapter_components(path, targets) for path in config.network.base_weights))
        roots = {DENOISER: family.load_denoiser(device="meta", dtype=torch.float32)}
        if changed - {DENOISER}:  # transformers' modules take seconds to import
            roots |= family.load_text_encoders(device="meta", dtype=torch.float32)
        for path in config.network.base_weights:
            match_layers(
                read_adapter(path, targets), layers_by_name(roots, targets), roots, targets, path, partial=True
            )
        network = create_network(config, roots, targets, run_seed=0)
        check_placement(config.memory, family, roots[DENOISER])
        return network

    def dtype(self, component: str, config: RunConfig, family: ModelFamily, precision: Precision) -> torch.dtype:
        """See ``Job``."""
        return precision.frozen

    def load(
        self, config: RunConfig, family: ModelFamily, *, device: torch.device, precision: Precision, seed: int
    ) -> dict[str, nn.Module]:
        """See ``Job``: nothing."""
        return {}

    def prepare(
        self, config: RunConfig, family: ModelFamily, roots: Mapping[str, nn.Module], *, seed: int, precision: Precision
    ) -> Any:
        """See ``Job``."""
        network = create_network(config, roots, family.adapter_targets, seed)
        return network.to(next(roots[DENOISER].parameters()).device, precision.trained)

    def blocks(self, family: ModelFamily, trainable: Any) -> Sequence[nn.Module]:
        """See ``Job``: none."""
        return ()

    def save(self, run: Run, stem: str, done: int, dtype: torch.dtype | None, facts: Mapping[str, str]) -> list[Path]:
        """See ``Job``: a file per format that was asked for."""
        assert run.config.network is not None
        written = []
        for suffix, (tensors, format_metadata) in run.trainable.files(run.config.network.save_format).items():
            path = Path(run.config.saving.output_dir) / f"{stem}{suffix}.safetensors"
            tensors = {name: _for_saving(tensor, dtype) for name, tensor in tensors.items()}
            known = {**facts, "sshs_model_hash": tensor_hash(tensors)}
            metadata = {**checkpoint_metadata(run, done, known, kind="/lora"), **format_metadata}
            try:
                save_tensors(tensors, path, metadata)
            except ValueError as error:  # fp16 has no number above 65504
                raise ConfigError(f"the adapter can't be saved: {error}; use another --save_precision") from error
            written.append(path)
        return written


def _for_saving(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
