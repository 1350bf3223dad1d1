# Sets the model options for the examples; sourced by them.
#   MODEL=models/Sana_1600M_1024px_BF16_diffusers bash examples/sana/subject_lora.sh
# MODEL is a folder in diffusers' layout, or NVlabs' file; beside a file, VAE and GEMMA name the other two parts.
# MODEL=miniature makes the miniature and runs the example on it, small enough for a CPU.

MODEL=${MODEL:-miniature}
OUTPUT=${OUTPUT:-output}
if [ "$MODEL" = miniature ]; then
    python tools/make_miniature.py sana --output miniatures/sana
    MODEL=miniatures/sana/sana-miniature.safetensors
    RESOLUTION=128 MAX_BUCKET=192 MIN_BUCKET=64 STEPS=${STEPS:-12} PRECISION=no
    SAMPLE_SIZE="--w 128 --h 128 --s 4 --l 4.5"
else
    RESOLUTION=${RESOLUTION:-1024} MAX_BUCKET=2048 MIN_BUCKET=512 PRECISION=${PRECISION:-bf16}
    SAMPLE_SIZE="--w $RESOLUTION --h $RESOLUTION --s 20 --l 4.5"
fi
mkdir -p "$OUTPUT"

model=(--pretrained_model_name_or_path "$MODEL" --mixed_precision "$PRECISION")
size=(--resolution "$RESOLUTION" --min_bucket_reso "$MIN_BUCKET" --max_bucket_reso "$MAX_BUCKET" --bucket_reso_steps 32)
if [ -n "${VAE:-}" ]; then model+=(--vae "$VAE"); fi
if [ -n "${GEMMA:-}" ]; then model+=(--gemma "$GEMMA"); fi

launch=(accelerate launch --num_cpu_threads_per_process 1 --num_machines 1 --dynamo_backend no)
if ! command -v nvidia-smi >/dev/null 2>&1; then
    launch+=(--cpu --num_processes 1 --mixed_precision no)
fi
