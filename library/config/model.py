"""Where the base model lies."""

from dataclasses import dataclass

from library.config.options import option


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base model."""

    pretrained_model_name_or_path: str | None = option(
        None,
        "The base model: one safetensors file with the denoiser and, perhaps, encoders and VAE inside; the denoiser's "
        "own file; or a folder in diffusers' layout. Names of the hub are not downloaded: download first, then give "
        "the folder.",
        metavar="PATH",
    )
    vae: str | None = option(
        None,
        "VAE: a safetensors file, a checkpoint with one inside, or a diffusers sub-folder. It replaces the one inside "
        "the base model, which is used by default.",
        metavar="PATH",
        aliases=("pretrained_vae_model_name_or_path",),
    )
    tokenizer_dir: str | None = option(
        None,
        "Folder of the tokenizers, in sub-folders named as in diffusers' layout. By default those in the base model's "
        "folder are used, then those in --tokenizer_cache_dir, then the hub's.",
        metavar="FOLDER",
    )
    tokenizer_cache_dir: str | None = option(
        None,
        "Folder that keeps the tokenizers that come from the hub, in sub-folders named as on the hub with _ for /. By "
        "default the hub's own cache.",
        metavar="FOLDER",
    )
    disable_mmap_load_safetensors: bool = option(
        False,
        "Read weights with plain file reads instead of mapping the files into memory. Faster on some network drives.",
    )
