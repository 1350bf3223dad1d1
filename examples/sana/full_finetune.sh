#!/usr/bin/env bash
# All weights of Sana 1.6B, in fp32 with bf16 arithmetic: 32 GB and more. Saved as a folder for diffusers.
#   MODEL=models/Sana_1600M_1024px_BF16_diffusers bash examples/sana/full_finetune.sh
# The pictures: edit examples/sana/subject_dataset.toml. On the miniature: MODEL=miniature (the default).
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/sana/model.sh

"${launch[@]}" sana_train.py "${model[@]}" "${size[@]}" \
    --dataset_config examples/sana/subject_dataset.toml \
    --output_dir "$OUTPUT" --output_name full_finetune \
    --learning_rate 1e-5 --optimizer_type AdamW --max_grad_norm 0.1 --lr_scheduler constant_with_warmup --lr_warmup_steps 0.05 \
    --max_train_steps "${STEPS:-4000}" --save_every_n_steps 1000 --save_last_n_steps 2000 --seed 1 \
    --cache_latents_to_disk --cache_text_encoder_outputs_to_disk --gradient_checkpointing \
    --save_model_as diffusers --save_precision bf16 "$@"
