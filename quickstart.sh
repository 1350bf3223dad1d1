#!/usr/bin/env bash
# Trains a LoRA on a miniature model and a dozen photographs, from nothing but Python, in a few minutes on two CPU cores.
#   bash quickstart.sh [sd3]
# It needs no model files: the miniature has random weights, so its pictures are patterns. What you see is the whole way
# of a real run: dataset, caches, training, samples, files.
set -euo pipefail
cd "$(dirname "$0")"
family=${1:-sd3}
if [ "$family" != sd3 ]; then
    echo "error: no quickstart for '$family'; there is: sd3" >&2
    exit 2
fi
source tools/environment.sh
make_environment .venv requirements.txt
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false

output=quickstart/$family
model=$output/miniature
mkdir -p "$output"
python tools/make_miniature.py "$family" --output "$model"

launch=(--num_cpu_threads_per_process "$(getconf _NPROCESSORS_ONLN)")
if ! command -v nvidia-smi >/dev/null 2>&1; then
    launch+=(--cpu)
fi
accelerate launch "${launch[@]}" --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    "${family}_train_network.py" \
    --pretrained_model_name_or_path="$model/$family-miniature.safetensors" \
    --dataset_config=examples/sd3/quickstart.toml \
    --output_dir="$output" --output_name=quickstart_lora \
    --network_module=networks.lora --network_dim=8 --network_alpha=8 --network_train_unet_only \
    --learning_rate=2e-3 --optimizer_type=AdamW --lr_scheduler=cosine \
    --weighting_scheme=sigma_sqrt --timestep_sampling=logit_normal \
    --max_train_epochs=12 --save_state_on_train_end --seed=42 \
    --cache_latents_to_disk --cache_text_encoder_outputs_to_disk --vae_batch_size=4 \
    --sample_prompts=examples/sd3/quickstart_prompts.txt --sample_at_first --sample_every_n_epochs=12
python tools/sample_grid.py "$output/sample" --output "$output/before_after.png"

echo
echo "adapter:       $output/quickstart_lora.safetensors"
echo "before/after:  $output/before_after.png"
echo "log:           $output/quickstart_lora-log.jsonl"
echo "configuration: $output/quickstart_lora-run.toml"
