"""Wrong options, dataset files and prompts: name -> what is given, then one text per line that is printed."""

from tests.bad_input.workshop import BASE

SMALL_PROMPT = "a cat --w 64 --h 64 --s 1\n"

OPTIONS = {
    "unknown": ({"network_dimm": 4}, "unknown option --network_dimm; did you mean --network_dim?"),
    "a number that is none": ({"network_dim": "four"}, "--network_dim: expected a whole number"),
    "a fraction": ({"network_dim": "4.5"}, "--network_dim: expected a whole number"),
    "below the minimum": ({"network_dim": 0}, "--network_dim: expected a whole number of at least 1, got 0"),
    "not a number": ({"learning_rate": "nan"}, "--learning_rate: expected a number"),
    "no steps": ({"max_train_steps": 0}, "--max_train_steps"),
    "bf16 misspelt": ({"mixed_precision": "bf17"}, "--mixed_precision: expected one of no, fp16, bf16, got 'bf17'"),
    "full_bf16 in fp32": ({"full_bf16": True}, "--full_bf16 needs --mixed_precision bf16"),
    "pickles": ({"save_model_as": "ckpt"}, "--save_model_as: ckpt files are pickles"),
    "a path as name": ({"output_name": "a/b"}, "--output_name: expected a file name without folder"),
    "an unknown optimizer": ({"optimizer_type": "AdamV"}, "unknown optimizer 'AdamV'; did you mean AdamW?"),
    "two attentions": ({"sdpa": True, "xformers": True}, "--sdpa and --xformers exclude each other"),
    "two lengths": ({"max_train_epochs": 2}, "--max_train_epochs 2 and --max_train_steps 4"),
    "four rates": ({"text_encoder_lr": [1, 2, 3, 4]}, "--text_encoder_lr takes 1 to 3 values, got 4"),
    "TensorBoard nowhere": ({"log_with": "tensorboard"}, "--log_with tensorboard needs --logging_dir"),
    "samples never": ({"sample_prompts": "p.txt"}, "--sample_prompts p.txt does nothing until it is said when"),
    "does nothing here": ({"clip_skip": 2}, "--clip_skip does nothing for sd3"),
    "no data": ({"dataset_config": None}, "no pictures to train on: give --dataset_config"),
    "no model": ({BASE: None}, f"--{BASE} is missing"),
    "no such model": ({BASE: "no.safetensors"}, f"--{BASE}: no.safetensors does not exist"),
    "a name of the hub": ({BASE: "stabilityai/sd3"}, "download it first"),
    "no such VAE": ({"vae": "no.safetensors"}, "--vae: no.safetensors does not exist"),
    "no such encoder": ({"clip_g": "no.safetensors"}, "--clip_g: no.safetensors does not exist"),
    "no such dataset": ({"dataset_config": "no.toml"}, "no.toml: no such file"),
    "no such adapter": ({"network_weights": "no.safetensors"}, "--network_weights no.safetensors: no such file"),
    "no such state": ({"resume": "no-state"}, "--resume no-state: no such folder"),
    "no such prompts": ({"sample_prompts": "no.txt", "sample_at_first": True}, "no.txt: no such file"),
    "no such thumbnail": ({"metadata_thumbnail": "no.png"}, "--metadata_thumbnail no.png: no such file"),
    "a missing block": (
        {"sample_prompts": "tests/data/keys", "validation_guidance_skip_layers": 9, "sample_at_first": True},
        "--validation_guidance_skip_layers 9: the denoiser has blocks 0 to 2",
        "tests/data/keys: a prompt file ends in .txt",
    ),
    "sizes of samples": (
        {"validation_resolution": "1024*1024"}, "--validation_resolution: expected sizes such as 1024x1024,1280x768",
    ),
    "a size of samples": (
        {"validation_prompt": "a cat", "sample_at_first": True, "validation_resolution": "64x72"},
        "--validation_resolution 64x72: height 72 isn't a multiple of 16; the nearest are 64 and 80",
    ),
    "no table of sizes": (
        {"validation_prompt": "a cat", "sample_at_first": True, "use_resolution_binning": True},
        "--use_resolution_binning does nothing for Stable Diffusion 3.5 medium: it has no table of sizes",
    ),
    "previews of nothing": ({"preview_every": 5}, "--preview_every does nothing without --sample_prompts"),
    "no such base weights": (
        {"base_weights": ["a", "b"]}, "--base_weights a: no such file", "--base_weights b: no such file",
    ),
}  # fmt: skip

DATASETS = {
    "syntax": (lambda w: w.dataset(append="[[["), "dataset.toml: not valid TOML: "),
    "a folder": (lambda w: w.folder, "can't be read (Is a directory)"),
    "nothing in it": (lambda w: w.file("", "dataset.toml"), "dataset.toml: no dataset; add [[datasets]]"),
    "broken JSON": (lambda w: w.file("{", "dataset.json"), "dataset.json: not valid JSON"),
    "unknown in general": (
        lambda w: w.dataset(("[general]", "[general]\nresolutoin = 64")),
        "dataset.toml: general.resolutoin: unknown key; did you mean resolution?",
    ),
    "unknown in a dataset": (
        lambda w: w.dataset(("batch_size", "batch_sise")),
        "dataset.toml: datasets[0].batch_sise: unknown key; did you mean batch_size?",
    ),
    "unknown in a subset": (
        lambda w: w.dataset(append="num_repeat = 3"),
        "dataset.toml: datasets[0].subsets[0].num_repeat: unknown key; did you mean num_repeats?",
    ),
    "misplaced": (lambda w: w.dataset(("[general]", "[general]\nimage_dir = 'x'")), "general.image_dir: belongs in"),
    "type in general": (
        lambda w: w.dataset(("[general]", "[general]\nshuffle_caption = 'yes'")),
        "dataset.toml: general.shuffle_caption: expected true or false, got 'yes'",
    ),
    "type in a dataset": (
        lambda w: w.dataset(("batch_size = 2", "batch_size = '2'")),
        "dataset.toml: datasets[0].batch_size: expected a whole number of at least 1, got '2'",
    ),
    "type in a subset": (
        lambda w: w.dataset(append="num_repeats = 1.5"), "datasets[0].subsets[0].num_repeats: expected a whole number",
    ),
    "no batch": (
        lambda w: w.dataset(("batch_size = 2", "batch_size = 0")),
        "datasets[0].batch_size: expected a whole number of at least 1, got 0",
    ),
    "no such folder": (
        lambda w: w.dataset((str(w.trainer.photos), str(w.folder / "no"))), "datasets[0].subsets[0].image_dir: ",
    ),
    "no resolution": (lambda w: w.dataset(("resolution = 64", "")), "datasets[0].resolution: missing"),
    "a negative resolution": (
        lambda w: w.dataset(("resolution = 64", "resolution = -64")), "datasets[0].resolution: expected a size",
    ),
    "a resolution between steps": (
        lambda w: w.dataset(("resolution = 64", "resolution = 100")),
        "datasets[0].resolution: 100x100 is not a multiple of 16 on both sides; 96x96 is",
    ),
    "a resolution below a bucket step": (
        lambda w: w.dataset(("resolution = 64", "resolution = 16"), ("min_bucket_reso = 32", "min_bucket_reso = 16")),
        "datasets[0].resolution: 16x16 is smaller than one bucket step (32)",
    ),
    "bucket steps between the model's": (
        lambda w: w.dataset(("bucket_reso_steps = 32", "bucket_reso_steps = 24")),
        "datasets[0].bucket_reso_steps: 24 is not a multiple of 16, which this model needs; 32 is",
    ),
    "bucket limits that exclude it": (
        lambda w: w.dataset(("min_bucket_reso = 32", "min_bucket_reso = 128")),
        "datasets[0].min_bucket_reso: 128 is above the short side of 64x64",
    ),
    "larger than the position table": (
        lambda w: w.dataset(("resolution = 64", "resolution = 512")),
        "datasets[0].resolution: 512x512 is too large for this model, whose table of positions ends at 256 pixels per "
        "side; at most 256x256",
    ),
    "larger than the position table, one size": (
        lambda w: w.dataset(("resolution = 64", "resolution = [64, 288]\nenable_bucket = false")),
        "datasets[0].resolution: 64x288 is too large for this model",
    ),
}  # fmt: skip

PROMPTS = {
    "not a multiple": ("a cat --w 100 --h 64\n", "prompts.txt, line 1: width 100 isn't a multiple of 16"),
    "too large": ("a cat --w 64 --h 272\n", "prompts.txt, line 1: height 272 is too large for this model"),
    "unknown option": (SMALL_PROMPT + "a dog --zz 3\n", "prompts.txt, line 2: unknown option --zz"),
    "not a number": ("a cat --s many\n", "prompts.txt, line 1: --s: expected a whole number"),
    "empty": ("\n", "prompts.txt: no prompts in it"),
    "not UTF-8": (b"caf\xe9", "prompts.txt: not a text file in UTF-8"),
    "several": ("a --w 8\nb --h 999\n", "line 1: width 8 isn't a multiple", "line 2: height 999 is too large"),
}
