r"""Full fine-tuning of Sana and Sana-1.5.

python sana_train.py --pretrained_model_name_or_path Sana_1600M_1024px_BF16_diffusers --dataset_config dataset.toml \
    --cache_latents --cache_text_encoder_outputs --gradient_checkpointing --output_name my_model
"""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("sana", job="full"))
