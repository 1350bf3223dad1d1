#!/usr/bin/env bash
# A subject (a person, a pet, a thing) from 5 to 30 pictures, on Stable Diffusion 3.5 medium with 12 GB and more.
#   MODEL=/models/sd3.5_medium.safetensors CLIP_L=/models/clip_l.safetensors CLIP_G=/models/clip_g.safetensors \
#   T5XXL=/models/t5xxl_fp16.safetensors bash examples/sd3/subject_lora.sh
# The pictures: edit examples/sd3/subject_dataset.toml. On the miniature: MODEL=miniature (the default).
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/sd3/model.sh

cat > "$OUTPUT/subject_prompts.txt" <<PROMPTS
a photo of the cat sitting on a wooden table $SAMPLE_SIZE --d 1
an oil painting of the cat $SAMPLE_SIZE --d 2
PROMPTS

"${launch[@]}" sd3_train_network.py "${model[@]}" \
    --dataset_config examples/sd3/subject_dataset.toml \
    --output_dir "$OUTPUT" --output_name subject_lora \
    --network_module networks.lora --network_dim 16 --network_alpha 16 --network_train_unet_only \
    --learning_rate 2e-4 --optimizer_type AdamW --lr_scheduler constant_with_warmup --lr_warmup_steps 0.05 \
    --weighting_scheme sigma_sqrt --timestep_sampling logit_normal \
    --max_train_steps "${STEPS:-1200}" --save_every_n_steps 300 --save_last_n_steps 600 --save_state --seed 1 \
    --cache_latents_to_disk --cache_text_encoder_outputs_to_disk --gradient_checkpointing \
    --sample_prompts "$OUTPUT/subject_prompts.txt" --sample_at_first --sample_every_n_steps 300 \
    --save_format both "$@"
