"""Wrong inputs that only torch can see, and those of generate.py: name -> how to make them, then the lines."""

from tests.bad_input.workshop import BASE, FLUX, QKV, UNET_ONLY, WIDTH, without
from tests.families.sd3.published_files import everything

_FC1 = "text_model.encoder.layers.3.mlp.fc1.weight"


def _wrong_tensor():
    (name,) = (name for name in everything("medium") if name.endswith("clip_g.transformer." + _FC1))
    return {name: (17, 1280)}


LATE = {
    "optimizer argument": (lambda w: {"optimizer_args": "bogus=1"}, "--optimizer_args: AdamW has no argument 'bogus'"),
    "optimizer argument's type": (lambda w: {"optimizer_args": "weight_decay=much"}, "--optimizer_args: AdamW says: "),
    "optimizer argument's range": (lambda w: {"optimizer_args": "betas=2,3"}, "--optimizer_args: AdamW says: Invalid"),
    "optimizer not installed": (lambda w: {"optimizer_type": "nowhere.Best"}, "pip install nowhere"),
    "no optimizer": (lambda w: {"optimizer_type": "torch.nn.Linear"}, "torch.nn.Linear is no optimizer"),
    "optimizer with closures": (lambda w: {"optimizer_type": "torch.optim.LBFGS"}, "--optimizer_type: LBFGS asks for"),
    "schedule": (lambda w: {"lr_scheduler_type": "Nix"}, "--lr_scheduler_type: torch.optim.lr_scheduler has no class"),
    "schedule that needs a loss": (lambda w: {"lr_scheduler_type": "ReduceLROnPlateau"}, "follows a measurement"),
    "schedule arguments": (
        lambda w: {"lr_scheduler_type": "StepLR", "lr_scheduler_args": "bogus=1"}, "--lr_scheduler_args: StepLR says",
    ),
    "schedule arguments' values": (lambda w: {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": "max_lr=1"},
        "--lr_scheduler_args: OneCycleLR says"),
    "schedule rules": (
        lambda w: {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": "step_rules=abc"}, "not 'abc'",
    ),
    "a rate in words": (
        lambda w: {"lr_scheduler": "polynomial", "lr_scheduler_args": "lr_end=low"}, "lr_end must be a number",
    ),
    "a schedule for an optimizer with its own": (
        lambda w: {
            "optimizer_type": "Adafactor", "optimizer_args": "relative_step=True", "lr_scheduler": "cosine",
        },
        "--lr_scheduler cosine does nothing: Adafactor sets the learning rate by itself",
    ),
    "adapter settings": (
        lambda w: {"network_args": ["x_atn_dim=1", "loraplus_lr_ration=2"]},
        "unknown name x_atn_dim; did you mean x_attn_dim?", "unknown name loraplus_lr_ration",
    ),
    "adapter blocks": (
        lambda w: {"network_args": ["train_block_indices=9"]}, "names block 9, but denoiser has blocks 0 to 2",
    ),
    "an adapter setting that does nothing": (
        lambda w: {"network_args": ["train_t5xxl=true"], **UNET_ONLY}, "train_t5xxl does nothing with --network_train",
    ),
    "an adapter of nothing here": (lambda w: {"network_weights": w.sparse(FLUX)}, "is not an adapter for this model"),
    "an adapter of another family": (
        lambda w: {"network_weights": w.lora((4, 3072), (9216, 4), layer="lora_unet_double_blocks_0_img_attn_qkv")},
        "is for another model: 1 of its 1 layers don't exist here",
    ),
    "an adapter of a deeper model": (
        lambda w: {"network_weights": w.lora((2, WIDTH), (3 * WIDTH, 2), layer=QKV.replace("_0_", "_30_"))},
        "is for another model: 1 of its 1 layers don't exist here",
    ),
    "an adapter of a wider model": (
        lambda w: {"network_weights": w.lora((2, 1536), (4608, 2))}, "changes a weight of size [4608, 1536], here it",
    ),
    "an adapter of another rank": (
        lambda w: {"network_weights": w.lora((4, WIDTH), (3 * WIDTH, 4))}, "has rank 4 where this run has 2",
    ),
    "half an adapter": (
        lambda w: {"network_weights": w.sparse({f"{QKV}.lora_down.weight": (2, WIDTH)})}, "has no up weights",
    ),
    "an adapter for what isn't trained": (
        lambda w: {
            "network_weights": w.lora((2, 64), (256, 2), layer="lora_te1_text_model_encoder_layers_0_mlp_fc1"),
            **UNET_ONLY,
        },
        "has nothing for the layers that this run trains",
    ),
    "a wider model's adapter to merge": (
        lambda w: {"base_weights": w.lora((2, 1536), (4608, 2))}, "is for another model",
    ),
    "text to merge": (lambda w: {"base_weights": w.file("words")}, "file.safetensors is not a safetensors file"),
    "a state that is none": (lambda w: {"resume": w.empty()}, "not a run state, it has no state.json"),
    "a damaged state": (lambda w: {"resume": w.file("[]", "state.json").parent}, "state.json is damaged"),
    "an incomplete state": (lambda w: {"resume": w.file('{"format": 1}', "state.json").parent}, "is damaged"),
    "a later state": (
        lambda w: {"resume": w.file('{"format": 99, "checksums": {}}', "state.json").parent}, "written in format 99",
    ),
    "tokenizers that aren't there": (lambda w: {"tokenizer_dir": w.empty()}, "holds no tokenizer of openai/clip"),
    "a T5 to train that isn't there": (
        lambda w: {
            BASE: w.sparse(without(everything("medium"), "t5xxl")), "network_args": ["train_t5xxl=true"],
        },
        "the adapter would train t5xxl, which this run doesn't load",
    ),
    "an encoder with a tensor of another shape": (
        lambda w: {BASE: w.sparse(everything("medium") | _wrong_tensor())}, "1 of another shape (text_model.encoder",
    ),
}  # fmt: skip

GENERATE = {
    "no prompt": (lambda w: [], "--prompt is missing"),
    "unknown": (lambda w: ["--prompt", "x", "--stepz", "4"], "unknown option --stepz; did you mean --steps?"),
    "FLUX": (lambda w: ["--prompt", "x", f"--{BASE}", w.sparse(FLUX)], "looks like FLUX (double_blocks.*)"),
    "truncated": (
        lambda w: ["--prompt", "x", f"--{BASE}", w.file(w.trainer.checkpoint.read_bytes()[:-9])], "is truncated: 9",
    ),
    "too large": (lambda w: ["--prompt", "x", "--width", 272], "--width 272 is too large for this model"),
    "too large in a file": (
        lambda w: ["--sample_prompts", w.file("a cat --h 512", "p.txt")], "p.txt, line 1: height 512 is too large",
    ),
    "block": (
        lambda w: ["--prompt", "x", "--validation_guidance_skip_layers", 3], "3: the denoiser has blocks 0 to 2",
    ),
    "folder": (lambda w: ["--prompt", "x", "--output_dir", w.file("x")], "is a file, not a folder"),
    "adapter of nothing here": (lambda w: ["--prompt", "x", "--network_weights", w.sparse(FLUX)], "is not an adapter"),
    "adapter of a wider model": (
        lambda w: ["--prompt", "x", "--network_weights", w.lora((2, 1536), (4608, 2))], "is for another model",
    ),
}  # fmt: skip
