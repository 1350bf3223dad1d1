#!/usr/bin/env bash
# A style at 512 and 1024 px at once, on Sana 1.6B: half of the steps cost a quarter, and the adapter works at both sizes.
#   MODEL=models/Sana_1600M_1024px_BF16_diffusers bash examples/sana/resolutions_lora.sh
# The pictures: edit examples/sana/resolutions_dataset.toml. On the miniature: MODEL=miniature (the default), at an eighth
# of the sizes.
set -euo pipefail
cd "$(dirname "$0")/../.."
dataset=examples/sana/resolutions_dataset.toml
if [ "${MODEL:-miniature}" = miniature ]; then
    mkdir -p "${OUTPUT:-output}"
    sed 's/= 256$/= 32/; s/= 512$/= 64/; s/= 1024$/= 128/; s/= 2048$/= 256/' "$dataset" > "${OUTPUT:-output}/resolutions_dataset.toml"
    dataset=${OUTPUT:-output}/resolutions_dataset.toml
fi
source examples/sana/model.sh

"${launch[@]}" sana_train_network.py "${model[@]}" \
    --dataset_config "$dataset" \
    --output_dir "$OUTPUT" --output_name resolutions_lora \
    --network_module networks.lora --network_dim 32 --network_alpha 32 --network_train_unet_only \
    --learning_rate 1e-4 --optimizer_type AdamW --lr_scheduler cosine --lr_warmup_steps 0.05 \
    --flow_schedule_shift 3 --max_grad_norm 0.1 \
    --max_train_steps "${STEPS:-3000}" --save_every_n_steps 500 --seed 1 \
    --cache_latents_to_disk --cache_text_encoder_outputs_to_disk --gradient_checkpointing "$@"
