# Sets the model options for the examples; sourced by them.
#   MODEL=models/v1-5-pruned-emaonly.safetensors bash examples/sd/subject_lora.sh
# MODEL is a published single file or a folder in diffusers' layout, of 1.x or 2.x. RESOLUTION=768 for 2.x at 768 px;
# where its file doesn't say that it predicts velocities, add --v_parameterization. VAE names another VAE.
# MODEL=miniature makes the miniature and runs the example on it, small enough for a CPU.

MODEL=${MODEL:-miniature}
OUTPUT=${OUTPUT:-output}
if [ "$MODEL" = miniature ]; then
    python tools/make_miniature.py sd --output miniatures/sd
    MODEL=miniatures/sd/sd-miniature.safetensors
    RESOLUTION=128 MAX_BUCKET=192 MIN_BUCKET=64 STEPS=${STEPS:-12} PRECISION=no
    SAMPLE_SIZE="--w 128 --h 128 --s 4"
else
    RESOLUTION=${RESOLUTION:-512} MAX_BUCKET=1024 MIN_BUCKET=256 PRECISION=${PRECISION:-bf16}
    SAMPLE_SIZE="--w $RESOLUTION --h $RESOLUTION --s 28"
fi
mkdir -p "$OUTPUT"

model=(--pretrained_model_name_or_path "$MODEL" --mixed_precision "$PRECISION")
size=(--resolution "$RESOLUTION" --min_bucket_reso "$MIN_BUCKET" --max_bucket_reso "$MAX_BUCKET" --bucket_reso_steps 64)
if [ -n "${VAE:-}" ]; then model+=(--vae "$VAE"); fi

launch=(accelerate launch --num_cpu_threads_per_process 1 --num_machines 1 --dynamo_backend no)
if ! command -v nvidia-smi >/dev/null 2>&1; then
    launch+=(--cpu --num_processes 1 --mixed_precision no)
fi
