#!/usr/bin/env bash
# Trains a miniature model on a dozen photographs, from nothing but Python, in a few minutes on two CPU cores: a LoRA on
# SD3, Sana or Stable Diffusion 1.x, and on Sana then the whole model too.
#   bash quickstart.sh [sd3|sana|sd]
# It needs no model files: the miniature has random weights, so its pictures are patterns. What you see is the whole way
# of a real run: dataset, caches, training, samples, files.
set -euo pipefail
cd "$(dirname "$0")"
family=${1:-sd3}
script=${family}_train_network.py
case $family in
    sd3) options=(--weighting_scheme=sigma_sqrt --timestep_sampling=logit_normal) ;;
    sana) options=(--no-use_resolution_binning) ;; # samples of the size that is trained, not of 1024 pixels
    sd)
        script=train_network.py
        options=(--min_snr_gamma=5)
        ;;
    *)
        echo "error: no quickstart for '$family'; there are: sd3, sana, sd" >&2
        exit 2
        ;;
esac
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

# train SCRIPT NAME OPTION...
train() {
    accelerate launch "${launch[@]}" --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
        "$1" --output_name="$2" \
        --pretrained_model_name_or_path="$model/$family-miniature.safetensors" \
        --dataset_config="examples/$family/quickstart.toml" --output_dir="$output" \
        --optimizer_type=AdamW --lr_scheduler=cosine "${options[@]}" --seed=42 \
        --cache_latents_to_disk --cache_text_encoder_outputs_to_disk --vae_batch_size=4 \
        --sample_prompts="examples/$family/quickstart_prompts.txt" "${@:3}"
}

train "$script" quickstart_lora \
    --network_module=networks.lora --network_dim=8 --network_alpha=8 --network_train_unet_only --learning_rate=2e-3 \
    --max_train_epochs=12 --save_state_on_train_end --sample_at_first --sample_every_n_epochs=12
python tools/sample_grid.py "$output/sample" --run quickstart_lora --output "$output/before_after.png"
if [ "$family" = sana ]; then
    train sana_train.py quickstart_full --learning_rate=1e-4 --max_train_epochs=6 --sample_every_n_epochs=6
fi

echo
echo "adapter:       $output/quickstart_lora.safetensors"
echo "before/after:  $output/before_after.png"
echo "log:           $output/quickstart_lora-log.jsonl"
echo "configuration: $output/quickstart_lora-run.toml"
if [ "$family" = sana ]; then
    echo "whole model:   $output/quickstart_full.safetensors"
fi
