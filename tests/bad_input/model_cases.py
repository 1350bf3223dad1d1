"""Wrong inputs that are refused without torch: name -> how to make them, then one text per line that is printed."""

import pickle

import torch

from tests.bad_input.workshop import BASE, FLUX, LORA, SD1, SDXL, Trap, scaled, without
from tests.families.sd3.published_files import everything, published

FILES = {
    "FLUX": (
        lambda w: {BASE: w.sparse(FLUX)},
        "model.safetensors looks like FLUX (double_blocks.*), expected SD3 (joint_blocks.*); no script here is for it",
    ),
    "SDXL": (
        lambda w: {BASE: w.sparse(SDXL)},
        "looks like SDXL (input_blocks.*, label_emb), expected SD3 (joint_blocks.*); no script here is for it",
    ),
    "SD1": (
        lambda w: {BASE: w.sparse(SD1)},
        "looks like SD1.x (input_blocks.*), expected SD3 (joint_blocks.*); it is for train_network.py and train.py",
    ),
    "Sana": (
        lambda w: {BASE: w.sparse(published("sana_600M_P1_D28"))},
        "; it is for sana_train_network.py and sana_train.py",
    ),
    "a LoRA as model": (lambda w: {BASE: w.sparse(LORA)}, "looks like a LoRA in kohya's spelling"),
    "unknown tensors": (lambda w: {BASE: w.sparse({"a": (2,)})}, "is not known (it holds a, ...), expected SD3"),
    "text": (lambda w: {BASE: w.file("no model, but words")}, "file.safetensors is not a safetensors file"),
    "a web page": (lambda w: {BASE: w.file("<!DOCTYPE html>" + " " * 99)}, "it is a web page"),
    "a Git LFS pointer": (lambda w: {BASE: w.file("version https://git-lfs.github.com/spec/v1\n")}, "git lfs pull"),
    "nothing in it": (lambda w: {BASE: w.file("")}, "file.safetensors is empty (0 bytes)"),
    "truncated data": (
        lambda w: {BASE: w.file(w.trainer.checkpoint.read_bytes()[:-1000])}, "is truncated: 1,000 bytes are missing",
    ),
    "truncated header": (
        lambda w: {BASE: w.file(w.trainer.checkpoint.read_bytes()[:99])}, "file.safetensors is truncated: at least",
    ),
    "a pickle that runs code": (
        lambda w: {BASE: w.file(pickle.dumps(Trap()), "model.pkl")}, "is a pickle file, but not one that torch saved",
    ),
    "a checkpoint that runs code": (
        lambda w: {BASE: w.saved({"state_dict": {"trap": Trap(), "a": torch.ones(1)}})},
        "model.ckpt can't be loaded safely: it contains more than tensors (posix.system)",
    ),
    "a checkpoint cut short": (
        lambda w: {BASE: w.file(w.saved({"a": torch.ones(9)}).read_bytes()[:200], "cut.ckpt")},
        "cut.ckpt is a truncated checkpoint",
    ),
    "an empty folder": (lambda w: {BASE: w.empty()}, f"--{BASE}: ", ),
    "a pipeline of another model": (
        lambda w: {BASE: w.file('{"_class_name": "FluxPipeline"}', "model_index.json").parent},
        "is a folder of FluxPipeline, expected one of StableDiffusion3Pipeline",
    ),
    "a denoiser alone": (
        lambda w: {BASE: w.sparse(published("medium"))},
        "no VAE: ", "no CLIP-L: ", "no CLIP-G: ",
    ),
    "an encoder is missing": (
        lambda w: {BASE: w.sparse(without(everything("medium"), "clip_g"))},
        "no CLIP-G: ",
    ),
    "a folder without an encoder": (
        lambda w: {BASE: w.pipeline_without("text_encoder_2")}, "has no folder text_encoder_2; add --clip_g",
    ),
    "a shard is missing": (
        lambda w: {BASE: w.pipeline_without("transformer/diffusion_pytorch_model-00002-of-00002.safetensors")},
        "names diffusion_pytorch_model-00002-of-00002.safetensors, which is not there",
    ),
    "a tensor is missing": (
        lambda w: {BASE: w.sparse(without(everything("medium"), "joint_blocks.5.x_block.mlp.fc1.weight"))},
        "is incomplete: 1 of ",
    ),
    "CLIP-G for CLIP-L": (
        lambda w: {BASE: w.sparse(everything("medium")), "clip_l": w.sparse(published("clip_g"), "g.safetensors")},
        "--clip_l: ",
    ),
    "a CLIP of another width": (
        lambda w: {
            BASE: w.sparse(everything("medium")),
            "clip_l": w.sparse(scaled(published("clip_l"), 768, 512), "l.safetensors"),
        },
        "(CLIP-L, width 512) and ",
    ),
    "a T5 of another width": (
        lambda w: {
            BASE: w.sparse(everything("medium")),
            "t5xxl": w.sparse(scaled(published("t5xxl"), 4096, 1024), "t5.safetensors"),
        },
        "t5.safetensors is a T5 of width 1024; the denoiser takes 4096",
    ),
    "a denoiser as encoder": (lambda w: {"t5xxl": w.sparse(FLUX)}, "--t5xxl: "),
    "an older VAE": (
        lambda w: {"vae": w.sparse(published("vae") | {"decoder.conv_in.weight": (512, 4, 3, 3)})},
        "holds an SD1 or SDXL VAE with 4 channels; SD3 needs 16",
    ),
    "an option of a T5 that isn't there": (
        lambda w: {BASE: w.sparse(without(everything("medium"), "t5xxl")), "t5_dropout_rate": 0.1},
        "--t5_dropout_rate does nothing: the base model has no T5 inside",
    ),
    "no folder of tokenizers": (lambda w: {"tokenizer_dir": w.folder / "no"}, "--tokenizer_dir: "),
    "the output folder is a file": (
        lambda w: {"output_dir": w.file("x"), "cache_dir": w.folder},
        "file.safetensors is a file, not a folder",
    ),
    "the output folder lies under a file": (lambda w: {"output_dir": w.file("x") / "out"}, "is a file, not a folder"),
    "the cache folder is a file": (lambda w: {"cache_dir": w.file("x")}, "--cache_dir "),
    "the log folder is a file": (lambda w: {"logging_dir": w.file("x")}, "--logging_dir "),
    "the log file is a folder": (lambda w: {"console_log_file": w.folder}, "--console_log_file "),
    "a thumbnail that is none": (lambda w: {"metadata_thumbnail": w.file("x")}, "not a picture in PNG, JPEG or WebP"),
    "tracker settings that aren't TOML": (
        lambda w: {"logging_dir": w.folder, "log_tracker_config": w.file("[[[", "t.toml")},
        "--log_tracker_config ",
    ),
    "settings of a tracker that isn't used": (
        lambda w: {"logging_dir": w.folder, "log_tracker_config": w.file("[wandb]\nname='a'", "t.toml")},
        "[wandb] is no tracker in use; in use: tensorboard",
    ),
    "a configuration file": (
        lambda w: {"config_file": w.file("network_dim = '4'\n[x]\nseeed = 1\n", "c.toml"), "network_dim": None},
        "c.toml: network_dim: expected a whole number", "c.toml: unknown key seeed; did you mean seed?",
    ),
    "a configuration file that isn't TOML": (
        lambda w: {"config_file": w.file("[[[", "c.toml")}, "c.toml: not valid TOML",
    ),
    "a configuration file that is a folder": (lambda w: {"config_file": w.folder}, "can't be read (Is a directory)"),
}  # fmt: skip
