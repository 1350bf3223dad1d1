r"""Pictures from prompts: the base model, with or without adapters.

python generate.py --pretrained_model_name_or_path models/stable-diffusion-3.5-medium --seed 1 \
    --prompt "a photo of a red panda" --network_weights output/my_adapter.safetensors --output_dir output/pictures
"""

import sys

from library.sampling.generate_command import main

if __name__ == "__main__":
    sys.exit(main())
