r"""Adapters on Stable Diffusion 3 / 3.5.

python sd3_train_network.py --pretrained_model_name_or_path sd3.5_medium.safetensors --dataset_config dataset.toml \
    --network_train_unet_only --cache_latents --cache_text_encoder_outputs --output_name my_adapter
"""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("sd3", job="adapter"))
