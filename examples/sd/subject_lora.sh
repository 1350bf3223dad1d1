#!/usr/bin/env bash
# A subject (a person, a pet, a thing) from 5 to 30 pictures, on Stable Diffusion 1.x or 2.x with 8 GB and more.
#   MODEL=models/v1-5-pruned-emaonly.safetensors bash examples/sd/subject_lora.sh
# The pictures: edit examples/sd/subject_dataset.toml. On the miniature: MODEL=miniature (the default).
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/sd/model.sh

cat > "$OUTPUT/subject_prompts.txt" <<PROMPTS
a photo of the cat sitting on a wooden table $SAMPLE_SIZE --d 1
an oil painting of the cat $SAMPLE_SIZE --d 2
PROMPTS

"${launch[@]}" train_network.py "${model[@]}" "${size[@]}" \
    --dataset_config examples/sd/subject_dataset.toml \
    --output_dir "$OUTPUT" --output_name subject_lora \
    --network_module networks.lora --network_dim 16 --network_alpha 16 --network_train_unet_only \
    --learning_rate 1e-4 --optimizer_type AdamW --lr_scheduler constant_with_warmup --lr_warmup_steps 0.05 \
    --min_snr_gamma 5 \
    --max_train_steps "${STEPS:-1200}" --save_every_n_steps 300 --save_last_n_steps 600 --save_state --seed 1 \
    --cache_latents_to_disk --cache_text_encoder_outputs_to_disk \
    --sample_prompts "$OUTPUT/subject_prompts.txt" --sample_at_first --sample_every_n_steps 300 "$@"
