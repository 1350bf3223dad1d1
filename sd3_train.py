r"""Full fine-tuning of Stable Diffusion 3 / 3.5.

python sd3_train.py --pretrained_model_name_or_path sd3.5_medium.safetensors --dataset_config dataset.toml \
    --cache_latents --cache_text_encoder_outputs --learning_rate 1e-5 --gradient_checkpointing --output_name my_model
"""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("sd3", job="full"))
