"""Wrong inputs for Sana: name -> how to make them, then one text per line that is printed."""

from library.io.header import read_header
from tests.bad_input.workshop import BASE, FLUX, SD1
from tests.families.sana.published_files import published as sana
from tests.families.sana.published_files import write_sparse, write_sparse_folder
from tests.families.sd3.published_files import everything
from tests.families.sd3.published_files import published as sd3

SPRINT = sana("1.5-1.6b") | {"cfg_embedder.mlp.0.weight": (2240, 256), "logvar_linear.weight": (1, 2240)}


def _parts(w):
    """The published DC-AE and Gemma."""
    return {"vae": w.sparse(sana("vae"), "dc-ae.safetensors"), "gemma": w.sparse(sana("gemma"), "gemma.safetensors")}


def _sparse_sana(w, denoiser=None, **changed):
    return {BASE: w.sparse(denoiser or sana("0.6b")), **_parts(w), **changed}


def _pipeline_of_sprint(w):
    folder = write_sparse_folder(w.folder / "pipeline", "1.5-1.6b")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shapes = {name: info.shape for name, info in read_header(path).tensors.items()}
    write_sparse(path, shapes | {"time_embed.guidance_embedder.linear_1.weight": (2240, 256)})
    return folder


FILES = {
    "SD3": (lambda w: {BASE: w.sparse(everything("medium"))}, "looks like SD3 (joint_blocks.*), expected Sana"),
    "SD1": (lambda w: {BASE: w.sparse(SD1)}, "; it is for train_network.py and train.py"),
    "SD3 with Sana's other parts": (
        lambda w: _sparse_sana(w, sd3("medium")), "looks like SD3 (joint_blocks.*), expected Sana",
    ),
    "FLUX": (lambda w: {BASE: w.sparse(FLUX)}, "looks like FLUX (double_blocks.*), expected Sana"),
    "a pipeline of SD3": (
        lambda w: {BASE: w.file('{"_class_name": "StableDiffusion3Pipeline"}', "model_index.json").parent},
        "is a folder of StableDiffusion3Pipeline, expected one of SanaPipeline",
    ),
    "Sprint": (
        lambda w: _sparse_sana(w, SPRINT),
        "is Sana Sprint, a model distilled to draw in one to four steps; plain flow matching undoes that",
    ),
    "a folder of Sprint": (lambda w: {BASE: _pipeline_of_sprint(w)}, "is Sana Sprint, a model distilled"),
    "a denoiser alone": (lambda w: {BASE: w.sparse(sana("0.6b"))}, "no VAE: ", "no Gemma 2: "),
    "SD3's VAE": (
        lambda w: _sparse_sana(w, vae=w.sparse(sd3("vae"), "vae.safetensors")), "--vae: ",
    ),
    "a T5 for Gemma": (
        lambda w: _sparse_sana(w, gemma=w.sparse(sd3("t5xxl"), "t5.safetensors")), "--gemma: ",
    ),
    "a tensor is missing": (
        lambda w: _sparse_sana(w, {k: v for k, v in sana("0.6b").items() if k != "blocks.3.attn.proj.bias"}),
        "is incomplete: 1 of ",
    ),
    "no such prefix": (
        lambda w: {"sana_prompt_prefix": w.folder / "no.txt"},
        "no.txt can't be read (No such file or directory); name a text file, or none",
    ),
    "an empty prefix": (
        lambda w: {"sana_prompt_prefix": w.file("\n", "prefix.txt")}, "prefix.txt is empty; write the text into it",
    ),
    "a prefix in another encoding": (
        lambda w: {"sana_prompt_prefix": w.file(b"\xe9t\xe9", "prefix.txt")}, "prefix.txt is not UTF-8 text",
    ),
    "a prefix that is a folder": (lambda w: {"sana_prompt_prefix": w.folder}, "can't be read (Is a directory)"),
    "a resolution between the steps": (
        lambda w: {"dataset_config": w.dataset(("resolution = 64", "resolution = [80, 64]\nenable_bucket = false"))},
        "datasets[0].resolution: 80x64",
    ),
    "steps of buckets between the steps": (
        lambda w: {"dataset_config": w.dataset(("bucket_reso_steps = 32", "bucket_reso_steps = 16"))},
        "bucket_reso_steps",
    ),
    "a sample between the steps": (
        lambda w: {
            "sample_prompts": w.file("a cat --w 80 --h 64", "p.txt"),
            "sample_at_first": True,
            "no-use_resolution_binning": True,
        },
        "p.txt, line 1: width 80",
    ),
    "a type that Gemma overflows in": (
        lambda w: {"mixed_precision": "fp16"}, "--mixed_precision fp16: Gemma 2 and DC-AE overflow in it; use",
    ),
    "a size that no model has": (
        lambda w: {"sana_image_size": 768}, "--sana_image_size: expected one of 512, 1024, 2048, 4096",
    ),
    "too short a window": (
        lambda w: {"sana_max_token_length": 1}, "--sana_max_token_length: expected a whole number from 2",
    ),
    "a shift beyond the range": (lambda w: {"flow_schedule_shift": 0.05}, "0.05"),
    "two shifts": (
        lambda w: {"flow_schedule_shift": 4, "flow_schedule_auto_shift": True}, "exclude each other",
    ),
    "options of SD3": (
        lambda w: {"clip_l": "clip.safetensors", "t5_dropout_rate": 0.1, "pos_emb_random_crop_rate": 0.5},
        "--clip_l does nothing for sana", "--t5_dropout_rate does nothing for sana",
        "--pos_emb_random_crop_rate does nothing for sana",
    ),
    "a CLIP's window": (lambda w: {"max_token_length": 225}, "--max_token_length does nothing for sana: use "),
}  # fmt: skip

LATE = {
    "optimizer argument": (lambda w: {"optimizer_args": "bogus=1"}, "--optimizer_args: AdamW has no argument 'bogus'"),
    "adapter settings": (lambda w: {"network_args": ["atn_dim=1"]}, "unknown name atn_dim; did you mean attn_dim?"),
    "an adapter setting of SD3": (lambda w: {"network_args": ["x_attn_dim=1"]}, "unknown name x_attn_dim"),
    "adapter blocks": (
        lambda w: {"network_args": ["train_block_indices=9"]}, "names block 9, but denoiser has blocks 0 to 2",
    ),
    "an adapter of SD3": (
        lambda w: {"network_weights": w.lora((4, 1536), (4608, 4))},
        "is for another model: 1 of its 1 layers don't exist here",
    ),
    "an adapter of a wider model": (
        lambda w: {"network_weights": w.lora((2, 2240), (6720, 2), layer="lora_unet_blocks_0_attn_qkv")},
        "changes a weight of size [6720, 2240]",
    ),
    "a tokenizer that isn't there": (lambda w: {"tokenizer_dir": w.empty()}, "holds no tokenizer of"),
}  # fmt: skip
