"""A training run's whole configuration, and the rules that span its groups."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.config.caching import CachingConfig
from library.config.captions import CaptionConfig
from library.config.control_net import ControlNetConfig, control_net_problems
from library.config.data import DataConfig
from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.ddpm import DdpmConfig, ddpm_problems
from library.config.ema import EmaConfig
from library.config.flow import FlowConfig, flow_problems
from library.config.full import FullConfig, full_model_problems, full_problems
from library.config.logging import LoggingConfig
from library.config.loss import LossConfig
from library.config.memory import MemoryConfig
from library.config.messages import holds_secret
from library.config.model import ModelConfig
from library.config.model_defaults import model_defaults, stated_changes, stated_problems
from library.config.network import NetworkConfig, network_problems
from library.config.non_finite import non_finite_problems
from library.config.optimizer import OptimizerConfig
from library.config.options import DEFAULT, option_values
from library.config.paths import path_problems
from library.config.pictures import PictureConfig
from library.config.sampling import SamplingConfig, skip_layer_problems
from library.config.saving import SavingConfig
from library.config.training import TrainingConfig
from library.config.updates import update_problems
from library.config.urls import is_remote
from library.config.validation import ValidationConfig
from library.records import ModelDescription

ADAPTER_LEARNING_RATE = 1e-4
DERIVED = "derived"

_CAPTION_CHANGES = {
    "shuffle_caption": "shuffles tags",
    "caption_tag_dropout_rate": "drops tags",
    "enable_wildcard": "chooses between wildcards and lines",
}
_MASKS = "conditioning_data_dir or alpha_mask"
_PIXEL_CHANGES = ("random_crop", "color_aug", "face_crop_aug_range")


JOBS: Mapping[str, Mapping[str, type]] = {
    "adapter": {"network": NetworkConfig},
    "full": {"full": FullConfig},
    "control_net": {"control_net": ControlNetConfig},
}
"""What a training script trains -> the option group of this kind of training, by the attribute of ``RunConfig``."""


def training_groups(family_options: Any, *, job: str) -> dict[str, type]:
    """This lists the option groups of a training script by the attribute of ``RunConfig``, in the order of ``--help``.

    Args:
        family_options: The family's ``options`` module.
        job: One of ``JOBS``.
    """
    return {
        "model": ModelConfig,
        "family": family_options.OPTIONS,
        "data": DataConfig,
        "pictures": PictureConfig,
        "captions": CaptionConfig,
        "caching": CachingConfig,
        **JOBS[job],
        "optimizer": OptimizerConfig,
        "training": TrainingConfig,
        "ema": EmaConfig,
        "memory": MemoryConfig,
        **family_options.OBJECTIVE_GROUPS,
        "validation": ValidationConfig,
        "sampling": family_options.SAMPLING,
        "saving": SavingConfig,
        "logging": LoggingConfig,
    }


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a training run does, validated group by group.

    Attributes:
        family_name: The model family's name in the registry.
        script: The script that was started, for messages and for the re-runnable configuration.
        provenance: Per option where its value comes from: ``typed``, ``from <file>``, ``default``, or ``derived: why``.
        family: The family's own options.
        flow: How noise levels are drawn; None for families that don't match flows.
        ddpm: The noise schedule of variances; None for families without one.
        loss: How the difference between answer and truth is measured.
        datasets: The datasets, read from what ``data`` names.
        network: The adapter; None when something else is trained.
        full: How the model itself is trained; None when it stays as it is.
        control_net: The ControlNet; None when something else is trained.
    """

    family_name: str
    script: str
    provenance: Mapping[str, str]
    model: ModelConfig
    family: Any
    data: DataConfig
    pictures: PictureConfig
    captions: CaptionConfig
    datasets: tuple[DatasetConfig, ...]
    caching: CachingConfig
    network: NetworkConfig | None = None
    full: FullConfig | None = None
    control_net: ControlNetConfig | None = None
    optimizer: OptimizerConfig
    training: TrainingConfig
    ema: EmaConfig
    memory: MemoryConfig
    flow: FlowConfig | None = None
    ddpm: DdpmConfig | None = None
    loss: LossConfig
    validation: ValidationConfig
    sampling: SamplingConfig
    saving: SavingConfig
    logging: LoggingConfig

    def as_dict(self) -> dict[str, Any]:
        """Every option's value by name, secrets left out, in types that JSON knows."""
        values = ((declared, value) for declared, value in option_values(self) if not declared.secret)
        return {declared.name: list(value) if isinstance(value, tuple) else value for declared, value in values}

    def was_given(self, name: str) -> bool:
        """Whether somebody typed the option or wrote it into the configuration file."""
        return self.provenance[name] != DEFAULT and not self.provenance[name].startswith(DERIVED)

    @property
    def cache_dir(self) -> str:
        """The folder of the stores, or its URL."""
        return self.caching.cache_dir or os.path.join(self.saving.output_dir, "cache")

    @property
    def local_cache_dir(self) -> str:
        """The folder on this machine for the index of files and, where the stores are remote, for their indexes."""
        return os.path.join(self.saving.output_dir, "cache") if is_remote(self.cache_dir) else self.cache_dir

    @property
    def trains_text_encoders(self) -> bool:
        """Whether text encoders learn, themselves or by an adapter."""
        rates = self.optimizer.text_encoder_lr
        if self.full is not None:
            return self.full.train_text_encoder and (rates is None or any(rate > 0 for rate in rates))
        if self.network is None or self.network.network_train_unet_only:
            return False
        return rates is None or any(rate > 0 for rate in rates)

    def problems(self) -> list[str]:
        """Every contradiction between groups, one line each; all at once, so that nobody meets them one per run."""
        # without datasets, because theirs are wrong, every option about them would seem to do nothing
        return [
            *self._secret_problems(),
            *(self._text_problems() if self.datasets else ()),
            *self._learning_problems(),
            *self._average_problems(),
            *update_problems(self.optimizer, self.training, self.memory),
            *(self.memory.full_model_problems() if self.full is not None else ()),
            *non_finite_problems(self.training, self.memory, self.saving),
            *(self._data_problems() if self.datasets else ()),
            *self._caching_problems(),
            *path_problems(self),
            *(flow_problems(self.flow, self.loss) if self.flow is not None else ()),
        ]

    def _secret_problems(self) -> Iterator[str]:
        """Addresses with a login or a signature: they would stand in caches, states, logs and saved files."""
        said = [(f"--{declared.name}", value) for declared, value in option_values(self) if not declared.secret]
        said += [
            (f"datasets[{index}].subsets[{number}].{name}", getattr(subset, name))
            for index, dataset in enumerate(self.datasets)
            for number, subset in enumerate(dataset.subsets)
            for name in ("image_dir", "metadata_file", "conditioning_data_dir")
        ]
        for name, value in said:
            texts = value if isinstance(value, tuple | list) else (value,)
            if any(isinstance(text, str | os.PathLike) and holds_secret(str(text)) for text in texts):
                yield (
                    f"{name}: the address has a login or a signature in it, which would be written into caches, states "
                    "and logs; give them in environment variables, or in the storage's own configuration"
                )

    def with_model_defaults(self, description: ModelDescription) -> "RunConfig":
        """The configuration with the defaults that depend on the model in the place of those that nobody gave.

        Args:
            description: What the model's files say about it.
        """
        changed: dict[str, Any] = {}
        sources = dict(self.provenance)
        defaults = model_defaults(description)
        for declared, value in option_values(self):
            group = changed.get(declared.group, getattr(self, declared.group))
            idle = getattr(group, "idle_options", ())
            if value is None and declared.name in defaults and declared.name not in idle:
                own, reason = defaults[declared.name]
                changed[declared.group] = dataclasses.replace(group, **{declared.name: own})
                sources[declared.name] = f"{DERIVED}: {reason}"
        return dataclasses.replace(self, provenance=sources, **changed)

    def model_problems(self, description: ModelDescription) -> list[str]:
        """What the configuration asks of a model that can't do it, one line each.

        Args:
            description: What the model's files say about it.
        """
        precision = self.training.mixed_precision
        refused = description.refused_precisions.get(precision)
        return [
            *([] if refused is None else [f"--mixed_precision {precision}: {refused}"]),
            *(stated_problems(option_values(self), description) if self.full is None else ()),
            *(ddpm_problems(self.ddpm) if self.ddpm is not None else ()),
            *skip_layer_problems(self.sampling, description),
            *self._position_problems(description.largest_side),
            *(full_model_problems(self, description) if self.full is not None else ()),
        ]

    def model_warnings(self, description: ModelDescription) -> list[str]:
        """What was guessed about the model where nobody said it, and what it is made to do against its files, one
        sentence each.

        Args:
            description: What the model's files say about it.
        """
        return [
            *(told for name, told in description.unsure.items() if not self.was_given(name)),
            *(stated_changes(option_values(self), description) if self.full is not None else ()),
        ]

    def _position_problems(self, largest_side: int | None) -> Iterator[str]:
        """Resolutions that are too large for every picture; those too large for some show once pictures are known."""
        for index, dataset in enumerate(self.datasets):
            step = dataset.bucket_reso_steps
            side = math.isqrt(dataset.resolution.area) // step * step
            if not dataset.enable_bucket:
                side = max(dataset.resolution)
            elif dataset.bucket_no_upscale:
                continue
            if largest_side is not None and side > largest_side:
                place = f"{self.data.dataset_config}: datasets[{index}]." if self.data.dataset_config else "--"
                yield (
                    f"{place}resolution: {dataset.resolution} is too large for this model, whose table of positions "
                    f"ends at {largest_side} pixels per side; at most {largest_side}x{largest_side}"
                )

    def _text_problems(self) -> Iterator[str]:
        caching = self.caching
        changed: dict[str, str] = {}
        for place, subset in self.subsets():
            if caching.cache_text_encoder_outputs and subset.token_warmup_step:
                yield (
                    "--cache_text_encoder_outputs encodes captions before training, but token_warmup_step of "
                    f"{place} adds tags over time; remove one"
                )
            changed |= {does: f"{name} of {place}" for name, does in _CAPTION_CHANGES.items() if getattr(subset, name)}
        if caching.cache_text_encoder_outputs and caching.caption_variants is None:
            for does, where in changed.items():
                yield (
                    f"--cache_text_encoder_outputs encodes each caption once, but {where} {does} at every visit; add "
                    "--caption_variants 8 to encode so many versions of each caption, or remove one"
                )
        if caching.caption_variants is not None and not (caching.cache_text_encoder_outputs and changed):
            yield (
                "--caption_variants does nothing without --cache_text_encoder_outputs and captions that change at "
                f"every visit ({', '.join(_CAPTION_CHANGES)}); remove it"
            )

    def subsets(self) -> Iterator[tuple[str, SubsetConfig]]:
        """Every subset with what messages call it."""
        for index, dataset in enumerate(self.datasets):
            for number, subset in enumerate(dataset.subsets):
                yield f"datasets[{index}].subsets[{number}] ({subset.title})", subset

    def _learning_problems(self) -> Iterator[str]:
        network = self.network
        if self.full is not None:
            yield from full_problems(self)
        if self.control_net is not None:
            yield from control_net_problems(self)
        if network is not None:
            yield from network_problems(network, self.optimizer, caches_text=self.caching.cache_text_encoder_outputs)
            if network.network_train_text_encoder_only and not self.trains_text_encoders:
                yield "--network_train_text_encoder_only leaves nothing to train: every --text_encoder_lr is 0"
            if self.saving.save_model_as != "safetensors":
                yield (
                    f"--save_model_as {self.saving.save_model_as} is for a full fine-tune; adapters are safetensors "
                    "files, in diffusers' names with --save_format diffusers"
                )
        steps, epochs = (self.provenance[name] for name in ("max_train_steps", "max_train_epochs"))
        if steps == epochs != DEFAULT:
            yield (
                f"--max_train_epochs {self.training.max_train_epochs} and --max_train_steps "
                f"{self.training.max_train_steps} both say how long; keep one"
            )

    def _average_problems(self) -> Iterator[str]:
        if self.ema.use_ema and "schedulefree" in self.optimizer.name.lower():
            yield (
                f"--use_ema does nothing with --optimizer_type {self.optimizer.name}, which averages the weights by "
                "itself; remove it"
            )
        if self.ema.ema_validation != "ema_only" and self.datasets and not (self._validates or self._draws_samples):
            yield (
                f"--ema_validation {self.ema.ema_validation} does nothing without samples or held-out pictures; add "
                "--sample_prompts or --validation_split, or remove it"
            )

    @property
    def _draws_samples(self) -> bool:
        return self.sampling.sample_prompts is not None

    @property
    def _validates(self) -> bool:
        subsets = (subset for _, subset in self.subsets())
        held_out = any(dataset.role == "validation" for dataset in self.datasets)
        return held_out or any(subset.validation_split for subset in subsets)

    def _data_problems(self) -> Iterator[str]:
        subsets = [subset for _, subset in self.subsets()]
        if not self._validates:
            for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"):
                if getattr(self.validation, name) is not None:
                    yield f"--{name} needs held-out pictures; add --validation_split 0.1"
            if self.data.validation_seed is not None:
                yield "--validation_seed does nothing without held-out pictures; add --validation_split 0.1"
        if self.data.prior_loss_weight != 1 and not any(subset.is_reg for subset in subsets):
            yield "--prior_loss_weight does nothing without regularisation pictures (is_reg, --reg_data_dir); remove it"
        taught = [place for place, subset in self.subsets() if subset.is_regularisation_data]
        if self.data.regularisation_weight != 1 and not taught:
            yield "--regularisation_weight does nothing without is_regularisation_data pictures; remove it"
        if taught and self.full is not None:
            yield f"{taught[0]}: is_regularisation_data needs an adapter to switch off; a full fine-tune has none"
        steered = self.control_net is not None
        if not any(subset.alpha_mask if steered else subset.has_masks for subset in subsets):
            kinds = "alpha_mask; conditioning_data_dir has control pictures" if steered else _MASKS
            for group, name in (
                ("data", "masked_loss"),
                ("data", "masked_loss_normalize"),
                ("pictures", "unmasked_weight"),
            ):
                if getattr(getattr(self, group), name):
                    yield f"--{name} does nothing without masks ({kinds}); remove it"
        for place, subset in self.subsets():
            for name in _PIXEL_CHANGES:
                if self.caching.cache_latents and getattr(subset, name):
                    yield (
                        f"--cache_latents keeps one version of a picture, but {name} of {place} makes others; "
                        "remove one"
                    )

    def _caching_problems(self) -> Iterator[str]:
        for name, switch in (
            ("vae_batch_size", "cache_latents"),
            ("text_encoder_batch_size", "cache_text_encoder_outputs"),
        ):
            if self.was_given(name) and not getattr(self.caching, switch):
                yield f"--{name} does nothing without --{switch}; add it or remove --{name}"


def make_run_config(
    family_name: str,
    script: str,
    groups: Mapping[str, Any],
    provenance: Mapping[str, str],
    datasets: tuple[DatasetConfig, ...],
) -> RunConfig:
    """This joins group instances to a run's configuration and fills in what follows from other options."""
    sources = dict(provenance)
    groups = dict(groups)
    if groups["optimizer"].learning_rate is None and groups.get("network") is not None:
        groups["optimizer"] = dataclasses.replace(groups["optimizer"], learning_rate=ADAPTER_LEARNING_RATE)
        sources["learning_rate"] = f"{DERIVED}: adapters start at {ADAPTER_LEARNING_RATE:g}"
    return RunConfig(family_name=family_name, script=script, provenance=sources, datasets=datasets, **groups)
