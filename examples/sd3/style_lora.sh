#!/usr/bin/env bash
# A style from 20 to 200 pictures with captions, kept apart from what the model knows by regularisation pictures.
#   MODEL=/models/sd3.5_medium.safetensors CLIP_L=/models/clip_l.safetensors CLIP_G=/models/clip_g.safetensors \
#   T5XXL=/models/t5xxl_fp16.safetensors bash examples/sd3/style_lora.sh
# The pictures: edit examples/sd3/style_dataset.toml. On the miniature: MODEL=miniature (the default).
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/sd3/model.sh

cat > "$OUTPUT/style_prompts.txt" <<PROMPTS
a lighthouse at the sea $SAMPLE_SIZE --d 1
a portrait of an old man $SAMPLE_SIZE --d 2
PROMPTS

"${launch[@]}" sd3_train_network.py "${model[@]}" \
    --dataset_config examples/sd3/style_dataset.toml --prior_loss_weight 0.5 \
    --output_dir "$OUTPUT" --output_name style_lora \
    --network_module networks.lora --network_dim 32 --network_alpha 16 --network_dropout 0.05 --network_train_unet_only \
    --network_args "context_mod_dim=0" "x_mod_dim=0" \
    --learning_rate 1e-4 --optimizer_type AdamW --lr_scheduler cosine --lr_warmup_steps 0.05 \
    --weighting_scheme sigma_sqrt --timestep_sampling logit_normal --training_shift 3 \
    --max_train_steps "${STEPS:-3000}" --gradient_accumulation_steps 2 --save_every_n_steps 500 --seed 1 \
    --cache_latents_to_disk --cache_text_encoder_outputs_to_disk --gradient_checkpointing \
    --sample_prompts "$OUTPUT/style_prompts.txt" --sample_at_first --sample_every_n_steps 500 "$@"
