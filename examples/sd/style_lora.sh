#!/usr/bin/env bash
# A style from 20 to 200 pictures with captions of any length: convolutions and the text encoder learn too, the middle
# of the U-Net at half the rate of the rest.
#   MODEL=models/v1-5-pruned-emaonly.safetensors bash examples/sd/style_lora.sh
# The pictures: edit examples/sd/style_dataset.toml. On the miniature: MODEL=miniature (the default).
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/sd/model.sh

cat > "$OUTPUT/style_prompts.txt" <<PROMPTS
a lighthouse at the sea $SAMPLE_SIZE --d 1
a portrait of an old man $SAMPLE_SIZE --d 2 --ss euler_a
PROMPTS

"${launch[@]}" train_network.py "${model[@]}" "${size[@]}" \
    --dataset_config examples/sd/style_dataset.toml --max_token_length 150 --clip_skip 2 --weighted_captions \
    --output_dir "$OUTPUT" --output_name style_lora \
    --network_module networks.lora --network_dim 32 --network_alpha 16 \
    --network_args "conv_dim=8" "conv_alpha=4" "mid_lr_weight=0.5" \
    --unet_lr 1e-4 --text_encoder_lr 1e-5 --optimizer_type AdamW --lr_scheduler cosine --lr_warmup_steps 0.05 \
    --noise_offset 0.05 --min_snr_gamma 5 \
    --max_train_steps "${STEPS:-3000}" --save_every_n_steps 500 --seed 1 \
    --cache_latents_to_disk --gradient_checkpointing \
    --sample_prompts "$OUTPUT/style_prompts.txt" --sample_at_first --sample_every_n_steps 500 "$@"
