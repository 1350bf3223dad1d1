"""Options of generate.py: pictures from prompts."""

from dataclasses import dataclass

from library.config.errors import ConfigError
from library.config.memory import FORMAT_NAMES
from library.config.options import option
from library.config.samplers import SAMPLERS, parse_sampler
from library.config.sampling import SkipLayerGuidance


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Pictures."""

    family: str | None = option(
        None,
        "Kind of model, such as sd3. By default it is told from the base model's tensor names.",
        metavar="NAME",
    )
    prompt: tuple[str, ...] = option(
        (), "One or more prompts, each in quotes. Options inside a prompt are text here; see --sample_prompts."
    )
    sample_prompts: str | None = option(
        None,
        "File of prompts (.txt, .toml or .json) as in training; what it says wins over the options here.",
        metavar="FILE",
        aliases=("from_file", "user_prompt_library"),
    )
    negative_prompt: str = option(
        "", "What guidance leads away from. By default the model's answer without any prompt."
    )
    width: int | None = option(
        None, "Pixels. By default the model's own size.", minimum=1, metavar="PIXELS", aliases=("W",)
    )
    height: int | None = option(
        None, "Pixels. By default the model's own size.", minimum=1, metavar="PIXELS", aliases=("H",)
    )
    use_resolution_binning: bool | None = option(
        None,
        "Computes each picture at the nearest size of the table that the model was trained with, then resizes and "
        "crops it to the size that was asked for. By default on for Sana; the others have no table.",
    )
    steps: int | None = option(
        None,
        "Sampling steps; 4 suits a turbo model. By default the model's own: 28 for SD3, 20 for Sana, 30 for Stable "
        "Diffusion 1.x and 2.x.",
        minimum=1,
        maximum=1000,
    )
    scale: float | None = option(
        None,
        "Classifier-free guidance. 1 turns it off, which halves the time and suits a turbo model. By default the "
        "model's own: 5 for SD3, 4.5 for Sana, 7.5 for Stable Diffusion 1.x and 2.x.",
        minimum=0.0,
        aliases=("cfg_scale",),
    )
    sampler: str | None = option(
        None,
        "Sampler: euler, heun or dpmpp_2m for SD3 and Sana; ddim, euler, euler_a, dpmpp_2m or unipc for Stable "
        "Diffusion 1.x and 2.x. By default the model's own: euler for SD3, dpmpp_2m for Sana, ddim for 1.x and 2.x.",
        choices=SAMPLERS,
        parse=parse_sampler,
        aliases=("sample_sampler",),
    )
    seed: int | None = option(
        None,
        "Seed of each prompt's first picture; the next ones of --images_per_prompt count up. By default one is drawn "
        "per run and written into the pictures.",
        minimum=0,
        maximum=2**63 - 1,
    )
    images_per_prompt: int = option(1, "Pictures of each prompt.", minimum=1)
    network_weights: tuple[str, ...] = option(
        (),
        "Adapter files, in kohya's or diffusers' spelling. By default the base model alone.",
        metavar="FILE",
    )
    network_mul: tuple[float, ...] = option(
        (), "Strength of each adapter file. By default 1.", aliases=("network_multiplier",)
    )
    output_dir: str = option("output", "Folder of the pictures.", metavar="FOLDER", aliases=("outdir",))
    output_name: str | None = option(
        None,
        "Start of the file names: <output_name>_<number>_<seed>.png, and an older file of that name is replaced. By "
        "default the date and time.",
    )
    preview_every: int | None = option(
        None,
        "Every so many steps, the unfinished picture is written beside where it will lie, as ..._preview.png, through "
        "a map from latents to colours that is fitted to the VAE. By default not.",
        minimum=1,
        metavar="STEPS",
        aliases=("validation_preview_steps",),
    )
    mixed_precision: str = option(
        "bf16",
        "The type that the model computes in and that its weights are kept in; no means fp32.",
        choices=("no", "fp16", "bf16"),
    )
    text_encoder_1_precision: str = option(
        "no_change",
        "Store the matrices of the first text encoder in 8 or 4 bits, as in training: CLIP-L of SD3, Gemma of Sana, "
        "CLIP or OpenCLIP of Stable Diffusion 1.x and 2.x.",
        choices=("no_change", *FORMAT_NAMES),
    )
    text_encoder_2_precision: str = option(
        "no_change", "The same for the second text encoder, SD3's CLIP-G.", choices=("no_change", *FORMAT_NAMES)
    )
    text_encoder_3_precision: str = option(
        "no_change", "The same for the third text encoder, SD3's T5.", choices=("no_change", *FORMAT_NAMES)
    )
    device: str = option("auto", "Where to compute: auto, cpu, cuda, cuda:1, mps. auto takes an accelerator if any.")
    no_half_vae: bool = option(False, "Decode in fp32, for a VAE that gives black pictures in half precision.")
    attn_mode: str = option(
        "torch",
        "Attention: torch, with the kernel that torch prefers; torch-cudnn, torch-flash or torch-efficient, with this "
        "kernel wherever it can; or a package that must be installed: xformers, flash (flash-attn), or sage "
        "(SageAttention, which computes in 8 bits: near the others and faster).",
        choices=("torch", "torch-cudnn", "torch-flash", "torch-efficient", "xformers", "flash", "sage"),
    )
    sdpa: bool = option(False, "Attention by torch's scaled_dot_product_attention, which is also the default.")
    xformers: bool = option(False, "Attention by xformers, which must be installed. By default torch's own.")
    validation_guidance_skip_layers: tuple[int, ...] = option(
        (),
        "Blocks to leave out in skip-layer guidance; 7 8 9 suits SD3.5 medium. By default no skip-layer guidance.",
        metavar="BLOCK",
    )
    validation_guidance_skip_layers_start: float = option(
        0.01, "Fraction of the steps after which skip-layer guidance acts.", minimum=0.0, maximum=1.0
    )
    validation_guidance_skip_layers_stop: float = option(
        0.2, "Fraction of the steps from which on skip-layer guidance no longer acts.", minimum=0.0, maximum=1.0
    )
    validation_guidance_skip_scale: float = option(2.8, "Strength of skip-layer guidance.")

    def __post_init__(self) -> None:
        problems = []
        if self.negative_prompt and self.scale == 1 and self.sample_prompts is None:
            problems.append("--negative_prompt does nothing at --scale 1, which is without guidance; remove one")
        if len(self.network_mul) > len(self.network_weights):
            problems.append(
                f"--network_mul has {len(self.network_mul)} values for {len(self.network_weights)} files of "
                "--network_weights; give one per file"
            )
        if self.output_name is not None and (not self.output_name or "/" in self.output_name):
            problems.append(
                f"--output_name {self.output_name!r} must be the start of a file name; the folder is --output_dir"
            )
        try:
            SkipLayerGuidance.of(self)
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def multipliers(self) -> tuple[float, ...]:
        """The strength of each adapter file."""
        return (*self.network_mul, *[1.0] * (len(self.network_weights) - len(self.network_mul)))
