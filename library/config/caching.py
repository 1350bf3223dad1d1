"""Options of the cache: latents and text features that are computed once and kept."""

from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.options import option

UNSUPPORTED: dict[str, str] = {
    "skip_cache_check": "there is nothing to skip: cache keys are hashes of the content, and a file's hash is "
    "remembered with its size and time, so unchanged files are not read again. Remove it",
}
"""Options of other tools in this group that do nothing here, with the reason."""


@dataclass(frozen=True, kw_only=True)
class CachingConfig:
    """Caching of latents and text features."""

    cache_latents: bool = option(
        False,
        "Encodes every picture once before training and keeps the latents in memory, so that the VAE isn't needed in a "
        "step. By default pictures are encoded in every step.",
        metadata_key="ss_cache_latents",
    )
    cache_latents_to_disk: bool = option(
        False,
        "Keeps the latents in --cache_dir, where later runs find them again. Implies --cache_latents. By default they "
        "are kept in memory, for this run alone.",
    )
    vae_batch_size: int = option(
        1,
        "Pictures that the VAE encodes at once while caching. More is faster and takes more memory.",
        minimum=1,
        metavar="N",
    )
    vae_cache_disable: bool = option(
        False,
        "Trains without cached latents, and encodes the pictures of the next step in the background while one is "
        "computed. It takes the memory of both at once. By default the step encodes its pictures first.",
    )
    cache_text_encoder_outputs: bool = option(
        False,
        "Encodes every caption once before training and keeps the features in memory, so that the text encoders "
        "aren't needed in a step. By default captions are encoded in every step.",
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False,
        "Keeps the text features in --cache_dir, where later runs find them again. Implies "
        "--cache_text_encoder_outputs. By default they are kept in memory, for this run alone.",
    )
    text_encoder_batch_size: int = option(
        8,
        "Captions that the text encoders encode at once while caching.",
        minimum=1,
        metavar="N",
    )
    caption_variants: int | None = option(
        None,
        "With cached text features and captions that change at every visit (shuffled tags, wildcards, several lines): "
        "encode so many versions of each caption, which the visits take in turn. There is no default.",
        minimum=1,
        metavar="N",
    )
    cache_dir: str | None = option(
        None,
        "Folder of the cache, or a URL such as s3://bucket/cache. Runs may share one, also at the same time. By "
        "default <output_dir>/cache.",
        metavar="DIR",
        aliases=("cache_dir_vae",),
    )
    no_half_vae: bool = option(
        False,
        "Runs the VAE in fp32. By default it runs in the precision of --mixed_precision.",
    )

    def __post_init__(self) -> None:
        if self.cache_latents_to_disk:
            object.__setattr__(self, "cache_latents", True)
        if self.cache_text_encoder_outputs_to_disk:
            object.__setattr__(self, "cache_text_encoder_outputs", True)
        if self.vae_cache_disable and self.cache_latents:
            raise ConfigError("--vae_cache_disable and --cache_latents exclude each other; keep one")
