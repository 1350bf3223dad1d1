#!/usr/bin/env bash
# A ControlNet that follows edges. The script draws the edges of the pictures itself, beside the results.
#   MODEL=models/v1-5-pruned-emaonly.safetensors bash examples/sd/control_net.sh
# The pictures: PICTURES and examples/sd/control_net_dataset.toml. On the miniature: MODEL=miniature (the default).
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/sd/model.sh

python - "${PICTURES:-examples/data/photos}" "$OUTPUT/edges" <<'END'
import pathlib, sys
from PIL import Image, ImageFilter

source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir(parents=True, exist_ok=True)
for path in source.iterdir():
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        edges = Image.open(path).convert("RGB").filter(ImageFilter.FIND_EDGES)
        edges.save(target / f"{path.stem}.png")
END

"${launch[@]}" train_control_net.py "${model[@]}" "${size[@]}" \
    --dataset_config examples/sd/control_net_dataset.toml --conditioning_data_dir "$OUTPUT/edges" \
    --output_dir "$OUTPUT" --output_name control_net \
    --learning_rate 1e-5 --max_train_steps "${STEPS:-20000}" --save_every_n_steps 2000 --save_last_n_steps 4000 --seed 1 \
    --cache_latents_to_disk --cache_text_encoder_outputs_to_disk --gradient_checkpointing "$@"
