# Sets the model options for the examples; sourced by them.
#   MODEL=/models/sd3.5_medium.safetensors bash examples/sd3/subject_lora.sh
# CLIP_L, CLIP_G, T5XXL and VAE name separate files, where the checkpoint has none inside.
# MODEL=miniature makes the miniature and runs the example on it, small enough for a CPU.

MODEL=${MODEL:-miniature}
OUTPUT=${OUTPUT:-output}
if [ "$MODEL" = miniature ]; then
    python tools/make_miniature.py sd3 --output miniatures/sd3
    MODEL=miniatures/sd3/sd3-miniature.safetensors
    RESOLUTION=128 MAX_BUCKET=192 MIN_BUCKET=96 BUCKET_STEP=32 STEPS=${STEPS:-12} PRECISION=no
    SAMPLE_SIZE="--w 128 --h 128 --s 4"
else
    RESOLUTION=${RESOLUTION:-1024} MAX_BUCKET=2048 MIN_BUCKET=512 BUCKET_STEP=64 PRECISION=${PRECISION:-bf16}
    SAMPLE_SIZE="--w $RESOLUTION --h $RESOLUTION --s 28"
fi
mkdir -p "$OUTPUT"

model=(--pretrained_model_name_or_path "$MODEL" --mixed_precision "$PRECISION")
model+=(--resolution "$RESOLUTION" --min_bucket_reso "$MIN_BUCKET" --max_bucket_reso "$MAX_BUCKET" --bucket_reso_steps "$BUCKET_STEP")
if [ -n "${CLIP_L:-}" ]; then model+=(--clip_l "$CLIP_L"); fi
if [ -n "${CLIP_G:-}" ]; then model+=(--clip_g "$CLIP_G"); fi
if [ -n "${T5XXL:-}" ]; then model+=(--t5xxl "$T5XXL"); fi
if [ -n "${VAE:-}" ]; then model+=(--vae "$VAE"); fi

launch=(accelerate launch --num_cpu_threads_per_process 1 --num_machines 1 --dynamo_backend no)
if ! command -v nvidia-smi >/dev/null 2>&1; then
    launch+=(--cpu --num_processes 1 --mixed_precision no)
fi
