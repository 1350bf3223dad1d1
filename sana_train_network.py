r"""Adapters on Sana / Sana-1.5.

python sana_train_network.py --pretrained_model_name_or_path sana_1600m.safetensors --dataset_config dataset.toml \
    --network_train_unet_only --cache_latents --cache_text_encoder_outputs --output_name my_adapter
"""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("sana", job="adapter"))
