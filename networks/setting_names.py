"""Names in ``--network_args`` that don't act: of other kinds of adapters, of other models, of other trainers."""

from collections.abc import Mapping

from library.config.errors import ConfigError, nearest_name
from library.config.network import METHODS
from networks.block_settings import ALPHA_LISTS, RANK_LISTS, ZERO_THRESHOLD

FALSE_TEXTS = ("false", "0", "no", "off", "n", "f")
_WHY_NOT_OURS = {
    "dropout": "its update has no inner activations to drop; use rank_dropout or module_dropout",
    "loraplus_lr_ratio": "LoRA+ is a rule for LoRA's two matrices",
    "loraplus_unet_lr_ratio": "LoRA+ is a rule for LoRA's two matrices",
    "loraplus_text_encoder_lr_ratio": "LoRA+ is a rule for LoRA's two matrices",
    "factor": "only a LoKr's update is cut into a Kronecker product",
    "decompose_both": "only a LoKr's update is cut into a Kronecker product",
    "full_matrix": "only a LoKr's factors can be whole",
}
_NO_WAYS = "it counts the blocks of a U-Net, which go down in resolution and up again, and this model has none"
_OTHER_MODELS = {
    **dict.fromkeys(
        (*RANK_LISTS, *ALPHA_LISTS, ZERO_THRESHOLD), f"{_NO_WAYS}. Use train_block_indices to choose blocks"
    ),
    **dict.fromkeys(("down_lr_weight", "mid_lr_weight", "up_lr_weight"), f"{_NO_WAYS}. Remove it"),
    **dict.fromkeys(
        ("context_attn_dim", "context_mlp_dim", "context_mod_dim", "x_attn_dim", "x_mlp_dim", "x_mod_dim"),
        "it is for the two streams of SD3, which this model hasn't. Remove it",
    ),
    "train_t5xxl": "this model has no T5. Remove it",
    "train_gemma": "this model has no Gemma. Remove it",
}
"""Settings of other models -> why they do nothing where a model doesn't have them."""

_REFUSED = {
    "split_qkv": "a fused qkv layer takes one update, which at three times the rank can be any three separate ones. "
    "Raise the rank (x_attn_dim, context_attn_dim) or remove it",
    "verbose": "what the adapter changes is logged in any case. Remove it",
    **{
        name: f"{meaning}. Remove it"
        for name, meaning in {
            "use_tucker": "there is no Tucker decomposition, which is for convolutions with kernels larger than 1",
            "use_cp": "there is no Tucker decomposition, which is for convolutions with kernels larger than 1",
            "use_scalar": "updates start at zero without a scalar",
            "dora_wd": "DoRA can't be trained",
            "weight_decompose": "DoRA can't be trained",
            "wd_on_output": "DoRA can't be trained",
            "rs_lora": "the strength is alpha / rank; give an alpha of the rank's square root times what you mean",
            "train_norm": "norms have no weights that an adapter could change",
            "bypass_mode": "a LoKr never makes its product, and a LoHa always does",
            "unbalanced_factorization": "both sides are cut by the same rule",
            "rank_dropout_scale": "what rank_dropout keeps is scaled up in any case",
            "block_size": "DyLoRA can't be trained",
            "constraint": "OFT can't be trained",
            "rescaled": "OFT can't be trained",
        }.items()
    },
}
_HARMLESS = {
    "split_qkv": FALSE_TEXTS,
    **{name: FALSE_TEXTS for name in ("use_tucker", "use_cp", "use_scalar", "dora_wd", "weight_decompose", "rs_lora")},
    **{name: FALSE_TEXTS for name in ("train_norm", "bypass_mode", "unbalanced_factorization")},
}
"""Values that say what happens anyway."""


def check_names(arguments: Mapping[str, str], known: set[str], method: str) -> None:
    """This refuses names that do nothing here, each with its reason.

    Args:
        arguments: ``--network_args``, name -> text.
        known: The names that act for this model and this kind of adapter.
        method: The kind: a name in ``METHODS``.

    Raises:
        ConfigError: For all of them at once.
    """
    problems = []
    for name, value in arguments.items():
        if name in known or value.lower() in _HARMLESS.get(name, ()):
            continue
        if name in _WHY_NOT_OURS:
            problems.append(
                f"--network_args {name} does nothing for {METHODS[method]}: {_WHY_NOT_OURS[name]}. Remove it"
            )
            continue
        if name in _OTHER_MODELS:
            problems.append(f"--network_args {name} does nothing for this model: {_OTHER_MODELS[name]}")
            continue
        if name in _REFUSED:
            problems.append(f"--network_args {name}={value} can't be used: {_REFUSED[name]}")
            continue
        near = nearest_name(name, known)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(sorted(known))}"
        problems.append(f"--network_args: unknown name {name}; {hint}")
    if problems:
        raise ConfigError("\n".join(problems))
