"""Wrong inputs for Stable Diffusion 1.x and 2.x: name -> how to make them, then one text per line that is printed."""

import torch

from tests.bad_input.workshop import BASE, FLUX, LORA, SDXL, UNET, Trap
from tests.families.sana.published_files import published as sana
from tests.families.sd.published_files import everything, write_sparse_folder
from tests.families.sd3.published_files import everything as sd3
from tests.families.sd3.published_files import published, write_sparse

FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"
PARTS_BESIDE = ("first_stage_model.", "cond_stage_model.")


def _of_channels(w, channels):
    return {BASE: w.sparse(everything("sd1") | {FIRST_CONVOLUTION: (320, channels, 3, 3)})}


def _unet_alone(w):
    return {BASE: w.sparse({k: v for k, v in everything("sd2").items() if not k.startswith(PARTS_BESIDE)})}


def _folder_without(w, part):
    folder = write_sparse_folder(w.folder / "pipeline", "sd2")
    (folder / part).rename(w.folder / "elsewhere")
    return {BASE: folder}


FILES = {
    "SDXL": (
        lambda w: {BASE: w.sparse(SDXL | {FIRST_CONVOLUTION: (320, 4, 3, 3)})},
        "looks like SDXL (input_blocks.*, label_emb), expected Stable Diffusion 1.x or 2.x (input_blocks.*, or "
        "down_blocks.* in diffusers' spelling); no script here is for it",
    ),
    "SD3": (lambda w: {BASE: w.sparse(sd3("medium"))}, "; it is for sd3_train_network.py and sd3_train.py"),
    "Sana": (lambda w: {BASE: w.sparse(sana("0.6b"))}, "; it is for sana_train_network.py and sana_train.py"),
    "FLUX": (lambda w: {BASE: w.sparse(FLUX)}, "looks like FLUX (double_blocks.*), expected Stable Diffusion 1.x"),
    "a pipeline of SD3": (
        lambda w: {BASE: w.file('{"_class_name": "StableDiffusion3Pipeline"}', "model_index.json").parent},
        "is a folder of StableDiffusion3Pipeline, expected one of StableDiffusionPipeline",
    ),
    "inpainting": (lambda w: _of_channels(w, 9), "is an inpainting U-Net (9 channels); only those that make pictures"),
    "image editing": (lambda w: _of_channels(w, 8), "is an image-editing U-Net (8 channels)"),
    "depth": (lambda w: _of_channels(w, 5), "is a depth-guided U-Net (5 channels)"),
    "a LoRA as model": (lambda w: {BASE: w.sparse(LORA)}, "looks like a LoRA in kohya's spelling"),
    "a checkpoint that runs code": (
        lambda w: {BASE: w.saved({"state_dict": {"trap": Trap(), "a": torch.ones(1)}})},
        "model.ckpt can't be loaded safely: it contains more than tensors (posix.system)",
    ),
    "a U-Net alone": (_unet_alone, "no VAE: ", "no text encoder: "),
    "a folder without an encoder": (
        lambda w: _folder_without(w, "text_encoder"), "has no folder text_encoder; name one that has it",
    ),
    "SD3's VAE": (
        lambda w: {"vae": write_sparse(w.folder / "vae.safetensors", published("vae"))},
        "holds a VAE with 16 channels; Stable Diffusion 1.x and 2.x need 4",
    ),
    "a 1.x said to be 2.x": (lambda w: {"v2": True}, "is Stable Diffusion 1.x; remove it"),
    "a layer that isn't there": (lambda w: {"clip_skip": 3}, "has 2 layers; at most 2"),
}  # fmt: skip
