"""Training the model's own weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from library.config.run import RunConfig
from library.families.protocols import ModelFamily
from library.training.full_model import DENOISER, FullModel, text_encoder_rates
from library.training.metadata import checkpoint_metadata
from library.training.model_files import write_model_files
from library.training.placing import swap_count
from library.training.precision import Precision
from library.training.run import Run
from library.training.shards import gathered


class FullJob:
    """``library.training.jobs.Job`` for full fine-tunes."""

    def check(self, config: RunConfig, family: ModelFamily) -> tuple[str, ...]:
        """See ``Job``."""
        if not config.trains_text_encoders:
            return (DENOISER,)
        rates = text_encoder_rates(family.description.trainable_text_encoders, config.optimizer)
        return (DENOISER, *(name for name, rate in rates.items() if rate > 0))

    def rehearse(self, config: RunConfig, family: ModelFamily) -> nn.Module:
        """See ``Job``."""
        roots = {DENOISER: family.load_denoiser(device="meta", dtype=torch.float32)}
        swap_count(config.memory, len(family.blocks(roots[DENOISER])))
        trained = self.check(config, family)
        if trained != (DENOISER,):  # transformers' modules take seconds to import
            roots |= family.load_text_encoders(device="meta", dtype=torch.float32, names=trained)
        return self._model(config, family, roots)

    def dtype(self, component: str, config: RunConfig, family: ModelFamily, precision: Precision) -> torch.dtype:
        """See ``Job``: what is trained is read in the type that it is trained in, not by way of a narrower one."""
        return precision.trained if component in self.check(config, family) else precision.frozen

    def load(
        self, config: RunConfig, family: ModelFamily, *, device: torch.device, precision: Precision, seed: int
    ) -> dict[str, nn.Module]:
        """See ``Job``: nothing."""
        return {}

    def prepare(
        self, config: RunConfig, family: ModelFamily, roots: Mapping[str, nn.Module], *, seed: int, precision: Precision
    ) -> FullModel:
        """See ``Job``."""
        return self._model(config, family, roots)

    def blocks(self, family: ModelFamily, trainable: FullModel) -> Sequence[nn.Module]:
        """See ``Job``: none."""
        return ()

    def save(self, run: Run, stem: str, done: int, dtype: torch.dtype | None, facts: Mapping[str, str]) -> list[Path]:
        """See ``Job``: one file, or a folder."""
        saving, full = run.config.saving, run.config.full
        assert full is not None
        weights = run.trainable.component_weights()
        if run.sharded:
            weights = {name: gathered(tensors) for name, tensors in weights.items()}
        if not run.accelerator.is_main_process:  # it has given its parts
            return []
        metadata = checkpoint_metadata(run, done, facts, kind="")

        def write(path: Path) -> None:
            run.family.write_model(
                weights, path, metadata, layout=saving.save_model_as, parts=full.save_parts, dtype=dtype
            )

        return [write_model_files(saving, stem, "model", write)]

    def _model(self, config: RunConfig, family: ModelFamily, roots: Mapping[str, nn.Module]) -> FullModel:
        trained = {name: roots[name] for name in self.check(config, family)}
        return FullModel(trained, family.description.trainable_text_encoders)
