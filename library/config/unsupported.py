"""Options that people know from elsewhere and that nothing here honours: the reason, or the replacement.

What one model family lacks stands in the family's own ``UNSUPPORTED``, and what the datasets lack in ``config.data``.
"""

from collections.abc import Mapping

_SHARDING = (
    "each process holds the whole base model, and an adapter's optimizer state is too small to share out. Start the "
    "processes with `accelerate launch` and remove it"
)
_HUB = "nothing is uploaded while training. Upload the result with `hf upload <repo> <file>`"
_EXACT_RESUME = "--resume always goes on exactly where the state was saved, data order included. Remove it"
_FP8 = "its fp8 has no scales. Use --base_model_precision fp8, which has one for each output"
_IN_PROMPTS = "each line of the --sample_prompts file says it for its picture"
_IN_DATASET = "the dataset TOML says it; see --dataset_config"

REASONS: dict[str, str] = {
    "fp8_base": _FP8,
    "fp8_base_unet": _FP8,
    "lowram": "parts are loaded one after another and leave memory when they are done, always. Remove it",
    "highvram": "the device's memory is given back between the caching and the training only. Remove it",
    "mem_eff_attn": "torch's own attention saves as much memory and is faster. Use --sdpa, or remove it",
    "huggingface_repo_id": _HUB,
    "huggingface_repo_type": _HUB,
    "huggingface_path_in_repo": _HUB,
    "huggingface_token": _HUB,
    "huggingface_repo_visibility": _HUB,
    "save_state_to_huggingface": _HUB,
    "async_upload": _HUB,
    "resume_from_huggingface": (
        "a state is resumed from a folder. Fetch it with `hf download <repo> --local-dir <folder>`, then --resume "
        "<folder>"
    ),
    "output_config": "--dry_run prints the resolved configuration as TOML, and each run writes one beside its output",
    "skip_until_initial_step": _EXACT_RESUME,
    "initial_step": _EXACT_RESUME,
    "initial_epoch": _EXACT_RESUME,
    "ddp_gradient_as_bucket_view": "gradients are summed without DistributedDataParallel's buckets. Remove it",
    "ddp_static_graph": "gradients are summed without DistributedDataParallel's graph. Remove it",
    "deepspeed": _SHARDING,
    "zero_stage": _SHARDING,
    "offload_optimizer_nvme_path": "state goes to host memory only. Use --offload_optimizer_device cpu",
    "offload_param_device": _SHARDING,
    "offload_param_nvme_path": _SHARDING,
    "zero3_init_flag": _SHARDING,
    "zero3_save_16bit_model": _SHARDING,
    "fp16_master_weights_and_gradients": _SHARDING,
    # SimpleTuner's
    "model_type": "the script says it: <model>_train_network.py trains adapters, <model>_train.py the model itself",
    "model_family": "the script says it: sd3_... is for Stable Diffusion 3 and 3.5, sana_... for Sana",
    "lycoris_config": (
        "its settings are options: `python -m tools.import_simpletuner` translates them, to --network_module "
        "lycoris.kohya --network_dim 8 --network_args algo=lokr factor=16 and the like"
    ),
    "ema_cpu_only": "use --ema_device cpu, which is the default",
    "ema_foreach_disable": "the average is the same either way. Remove it",
    "validation_preview": "unfinished samples are written where --preview_every says how often. Remove it",
    "num_validation_images": f"{_IN_PROMPTS}: repeat the line with another seed (--d)",
    "instance_prompt": f"{_IN_DATASET} (class_tokens)",
    "vae_dtype": "the VAE runs in --mixed_precision, or in fp32 with --no_half_vae",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "webhook_config": "numbers go to --log_with and to the JSON-lines file beside the output. Remove it",
    "attention_mechanism": "use --attn_mode: torch (the default), auto, xformers, flash",
    "snr_gamma": "it weights the losses of noise-prediction models. Remove it, or see --weighting_scheme",
    "checkpoints_total_limit": "the limit is counted in steps: --save_last_n_steps",
}
"""Option -> the end of ``--name is not supported: ...``."""

RENAMED: dict[str, str] = {
    "data_backend_config": "dataset_config",
    "lora_rank": "network_dim",
    "lora_alpha": "network_alpha",
    "lora_dropout": "network_dropout",
    "lora_type": "network_module",
    "init_lora": "network_weights",
    "lora_format": "save_format",
    "optimizer": "optimizer_type",
    "optimizer_config": "optimizer_args",
    "validation_steps": "sample_every_n_steps",
    "validation_epochs": "sample_every_n_epochs",
    "caption_dropout_probability": "caption_dropout_rate",
    "flow_sigmoid_scale": "sigmoid_scale",
    "cache_dir_text": "cache_dir",
    "lr_num_cycles": "lr_scheduler_num_cycles",
    "lr_power": "lr_scheduler_power",
    "lr_end": "lr_scheduler_min_lr_ratio",
    "dataloader_num_workers": "max_data_loader_n_workers",
    "batch_size": "train_batch_size",
    "num_repeats": "dataset_repeats",
    "huber_loss_c": "huber_c",
    "lr": "learning_rate",
    "learning_rate_te": "text_encoder_lr",
    "epochs": "max_train_epochs",
    "config": "config_file",
}
"""Option of another trainer -> its name here."""


def refusals(*tables: Mapping[str, str], family: str, family_table: Mapping[str, str]) -> dict[str, str]:
    """This joins the tables of refused options.

    Args:
        tables: Reasons for every family, such as ``config.data.UNSUPPORTED``.
        family: The family's name.
        family_table: The family's own reasons; they go first.

    Returns:
        Option -> the rest of the sentence that starts with its name.
    """
    renamed = {name: new for name, new in RENAMED.items() if new not in family_table}
    joined = {name: f"is called --{new} here" for name, new in renamed.items()}
    for table in (REASONS, *reversed(tables)):
        joined |= {name: f"is not supported: {reason}" for name, reason in table.items()}
    own = {name: family_table[new] for name, new in RENAMED.items() if new in family_table} | dict(family_table)
    return joined | {name: f"does nothing for {family}: {reason}" for name, reason in own.items()}
