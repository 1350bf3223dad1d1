#!/usr/bin/env bash
# Stable Diffusion 3.5 large (8 billion parameters) with as little memory as there is today: 24 GB at 768 px, batch 1.
# The base in bf16 takes 16.5 GiB; every block is recomputed in the backward pass; latents and text features are cached
# before the denoiser is loaded, so that the text encoders and the VAE never lie beside it.
#   MODEL=/models/sd3.5_large.safetensors CLIP_L=/models/clip_l.safetensors CLIP_G=/models/clip_g.safetensors \
#   T5XXL=/models/t5xxl_fp16.safetensors bash examples/sd3/large_small_card.sh
# On the miniature: MODEL=miniature (the default).
set -euo pipefail
cd "$(dirname "$0")/../.."
RESOLUTION=${RESOLUTION:-768}
source examples/sd3/model.sh

"${launch[@]}" sd3_train_network.py "${model[@]}" \
    --dataset_config examples/sd3/large_dataset.toml \
    --output_dir "$OUTPUT" --output_name large_lora \
    --network_module networks.lora --network_dim 8 --network_alpha 8 --network_train_unet_only \
    --network_args "context_mod_dim=0" "x_mod_dim=0" "context_mlp_dim=0" \
    --learning_rate 5e-5 --optimizer_type AdamW8bit --max_grad_norm 0.1 --lr_scheduler constant_with_warmup --lr_warmup_steps 100 \
    --weighting_scheme sigma_sqrt --timestep_sampling logit_normal --t5xxl_max_token_length 154 \
    --max_train_steps "${STEPS:-2000}" --gradient_accumulation_steps 4 --gradient_checkpointing \
    --save_every_n_steps 250 --save_last_n_steps 750 --save_state --save_precision bf16 --seed 1 \
    --cache_latents_to_disk --cache_text_encoder_outputs_to_disk "$@"
