r"""Adapters on Stable Diffusion 1.x / 2.x.

python train_network.py --pretrained_model_name_or_path v1-5-pruned-emaonly.safetensors --dataset_config dataset.toml \
    --network_train_unet_only --cache_latents --cache_text_encoder_outputs --output_name my_adapter
"""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("sd", job="adapter"))
