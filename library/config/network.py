"""Options of the adapter: which kind, how large, where it starts from and how it is saved."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.config.errors import ConfigError, nearest_name
from library.config.optimizer import OptimizerConfig
from library.config.options import option

SAVE_FORMATS = ("kohya", "diffusers", "both")

METHODS = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}
"""Kinds of adapters: name in the code -> for people."""

TRUE_TEXTS = ("true", "1", "yes", "on", "y", "t")
LYCORIS = "lycoris.kohya"
_MODULES = {f"networks.{method}": method for method in METHODS}
_ALGORITHMS = {"lora": "lora", "locon": "lora", "lokr": "lokr", "loha": "loha"}
_OTHER_METHODS = {
    "networks.lora_fa": "LoRA-FA",
    "networks.dylora": "DyLoRA",
    "networks.oft": "OFT",
    "networks.oft_flux": "OFT",
    "networks.control_net_lllite": "ControlNet-LLLite",
}


def parse_network_module(value: Any) -> str:
    """This accepts our kinds under any of the names that other trainers give theirs."""
    name = str(value)
    usable = ", ".join(_MODULES)
    if name in _OTHER_METHODS:
        raise ValueError(f"{_OTHER_METHODS[name]} ({name}) can't be trained; {usable} can")
    if name not in _MODULES and name != LYCORIS and not name.startswith("networks.lora_"):
        raise ValueError(f"{name!r} can't be used; those that work are {usable}, and {LYCORIS} for the last two")
    return name


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Adapter network."""

    network_module: str = option(
        "networks.lora",
        "The kind of adapter. networks.lora is LoRA, for every model; kohya's names for it (networks.lora_sd3, "
        "networks.lora_flux, ...) mean the same. networks.lokr is LoKr and networks.loha LoHa; lycoris.kohya with "
        "--network_args algo=lokr or algo=loha means the same.",
        parse=parse_network_module,
        metavar="NAME",
        metadata_key="ss_network_module",
    )
    network_dim: int = option(4, "Rank of the low-rank update.", minimum=1, metadata_key="ss_network_dim")
    network_alpha: float = option(
        1.0,
        "Strength of the update: it is multiplied by alpha / rank. 0 means alpha = rank, so no scaling.",
        minimum=0,
        metadata_key="ss_network_alpha",
    )
    network_dropout: float = option(
        0.0,
        "Probability that each of the adapter's inner activations is dropped in training. LoRA only.",
        minimum=0,
        metadata_key="ss_network_dropout",
    )
    network_args: tuple[str, ...] = option(
        (),
        "More settings of the adapter as key=value: rank_dropout, module_dropout, conv_dim, conv_alpha, "
        "preset=attn-mlp, train_block_indices=0,3-7; LoRA's loraplus_lr_ratio, loraplus_unet_lr_ratio, "
        "loraplus_text_encoder_lr_ratio; LoKr's factor, decompose_both, full_matrix; and the model's own. SD3 has "
        "context_attn_dim, context_mlp_dim, context_mod_dim, x_attn_dim, x_mlp_dim, x_mod_dim (ranks by type of layer, "
        "0 leaves a type out; for LoKr context_attn_factor and so on too), "
        "emb_dims=[context,t,x,y,final_mod,final_linear] and train_t5xxl=true. Stable Diffusion 1.x and 2.x have "
        "attn_dim, mlp_dim, emb_dims=[conv_in,time_embedding,conv_out]; conv_dim and conv_alpha add their residual "
        "blocks; by block they have block_dims, block_alphas, conv_block_dims, conv_block_alphas (a number per block), "
        "down_lr_weight, mid_lr_weight, up_lr_weight (numbers, or sine, cosine, linear, reverse_linear, zeros, with "
        "+0.25 to add) and block_lr_zero_threshold.",
        metavar="KEY=VALUE",
    )
    network_weights: str | None = option(
        None, "Adapter file to start from, in kohya's or diffusers' spelling. By default the adapter starts at zero.",
        metavar="FILE",
    )  # fmt: skip
    dim_from_weights: bool = option(
        False, "Takes layers, ranks and alphas from --network_weights instead of --network_dim and --network_alpha."
    )
    network_train_unet_only: bool = option(
        False, "Gives the text encoders no adapter. By default CLIP's text encoders are trained with the denoiser."
    )
    network_train_text_encoder_only: bool = option(False, "Gives the denoiser no adapter.")
    scale_weight_norms: float | None = option(
        None,
        "After each step, scales down every layer's update whose norm is above this; 1 is a good start. By default "
        "nothing is scaled.",
        metadata_key="ss_scale_weight_norms",
    )
    base_weights: tuple[str, ...] = option(
        (), "Adapter files to merge into the base model before training. They aren't part of what is saved.",
        metavar="FILE",
    )  # fmt: skip
    base_weights_multiplier: tuple[float, ...] = option(
        (), "Strength of each of --base_weights, in order; those without one have 1."
    )
    save_format: str = option(
        "kohya",
        "Spelling of the saved adapter: kohya is read by ComfyUI and most other programs, diffusers by diffusers' "
        "load_lora_weights; both writes two files. A LoKr or LoHa is written for diffusers as the LoRA that it equals.",
        choices=SAVE_FORMATS,
    )

    @property
    def base_weights_multipliers(self) -> tuple[float, ...]:
        """One strength per file of ``base_weights``."""
        missing = len(self.base_weights) - len(self.base_weights_multiplier)
        return (*self.base_weights_multiplier, *[1.0] * missing)

    @property
    def method(self) -> str:
        """The kind of adapter: a name in ``METHODS``."""
        if self.network_module == LYCORIS:
            return _ALGORITHMS[self._algorithm]
        return _MODULES.get(self.network_module, "lora")

    @property
    def _algorithm(self) -> str:
        return dict(split_network_args(self.network_args)).get("algo", "lora").lower()

    @property
    def idle_options(self) -> tuple[str, ...]:
        """The options that don't act, and so stand in no saved file."""
        whole = dict(split_network_args(self.network_args)).get("full_matrix", "").lower() in TRUE_TEXTS
        idle = ("network_dim", "network_alpha") if self.dim_from_weights or whole else ()
        return idle if self.network_dropout else (*idle, "network_dropout")

    @property
    def network_args_json(self) -> str:
        """The network arguments as kohya's files carry them: a JSON object of texts."""
        return json.dumps(dict(split_network_args(self.network_args)))

    def __post_init__(self) -> None:
        problems = [*self._starting_point_problems(), *self._merge_problems()]
        if not self.network_dropout < 1:
            problems.append(f"--network_dropout {self.network_dropout} must be below 1, or nothing is left to train")
        if self.scale_weight_norms is not None and not self.scale_weight_norms > 0:
            problems.append(f"--scale_weight_norms {self.scale_weight_norms} must be above 0")
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            problems.append(
                "--network_train_unet_only and --network_train_text_encoder_only together leave nothing to train; "
                "remove one, or both to train the denoiser and CLIP"
            )
        try:
            parse_network_module(self.network_module)
        except ValueError as error:
            problems.append(f"--network_module: {error}")
        try:
            problems += self._method_problems()
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))

    def _method_problems(self) -> list[str]:
        arguments = dict(split_network_args(self.network_args))
        if "algo" in arguments and self.network_module != LYCORIS:
            return [
                f"--network_args algo={arguments['algo']} goes with --network_module {LYCORIS}; with "
                f"{self.network_module} it does nothing, so remove it or change the module"
            ]
        if self.network_module == LYCORIS and self._algorithm not in _ALGORITHMS:
            near = nearest_name(self._algorithm, _ALGORITHMS)
            hint = f"did you mean {near}?" if near else f"{', '.join(_ALGORITHMS)} can"
            return [f"--network_args algo={arguments['algo']} can't be trained; {hint}"]
        if self.network_dropout and self.method != "lora":
            return [
                f"--network_dropout {self.network_dropout} does nothing for {METHODS[self.method]}: its update has no "
                "inner activations to drop. Use --network_args rank_dropout or module_dropout, or remove it"
            ]
        return []

    def _starting_point_problems(self) -> list[str]:
        if not self.dim_from_weights:
            return []
        if self.network_weights is None:
            return ["--dim_from_weights needs --network_weights: the file that layers, ranks and alphas come from"]
        fields = type(self).__dataclass_fields__
        return [
            f"--{name} {getattr(self, name)} does nothing with --dim_from_weights, which takes it from "
            f"{self.network_weights}; remove one of the two"
            for name in ("network_dim", "network_alpha")
            if getattr(self, name) != fields[name].default
        ]

    def _merge_problems(self) -> list[str]:
        files, multipliers = len(self.base_weights), len(self.base_weights_multiplier)
        if multipliers > files:
            return [f"--base_weights_multiplier has {multipliers} values for {files} files in --base_weights"]
        return []


def split_network_args(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """This cuts ``key=value`` texts in two.

    Raises:
        ConfigError: A text has no ``=``, or a key stands twice.
    """
    pairs: list[tuple[str, str]] = []
    for text in arguments:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key or not value:
            raise ConfigError(f"--network_args: expected key=value without spaces around it, got {text!r}")
        if key in dict(pairs):
            raise ConfigError(f"--network_args: {key} is given twice")
        pairs.append((key, value))
    return pairs


def network_problems(network: NetworkConfig, optimizer: OptimizerConfig, *, caches_text: bool) -> list[str]:
    """This lists what contradicts the adapter's options in other groups, one sentence each.

    Args:
        network: The adapter's options.
        optimizer: The learning rates.
        caches_text: Whether text features are computed once, before training.
    """
    problems = []
    rates = optimizer.text_encoder_lr
    if network.network_train_unet_only and rates is not None:
        problems.append(
            f"--text_encoder_lr {' '.join(f'{rate:g}' for rate in rates)} does nothing with --network_train_unet_only; "
            "remove one of the two"
        )
    if network.network_train_text_encoder_only and optimizer.unet_lr is not None:
        problems.append(
            f"--unet_lr {optimizer.unet_lr:g} does nothing with --network_train_text_encoder_only; remove one of them"
        )
    trains_text = not network.network_train_unet_only and (rates is None or any(rates))
    if caches_text and trains_text:
        problems.append(
            "--cache_text_encoder_outputs keeps text features fixed, but the text encoders are trained by default; add "
            "--network_train_unet_only, or don't cache them"
        )
    return problems
