r"""Full fine-tuning of Stable Diffusion 1.x / 2.x.

python train.py --pretrained_model_name_or_path v1-5-pruned-emaonly.safetensors --dataset_config dataset.toml \
    --cache_latents --cache_text_encoder_outputs --learning_rate 1e-5 --output_name my_model
"""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("sd", job="full"))
