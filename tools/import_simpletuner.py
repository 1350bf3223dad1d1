"""Turn a SimpleTuner ``config.json`` and ``multidatabackend.json`` into a run TOML and a dataset TOML.

python tools/import_simpletuner.py config/config.json --output_dir my_run
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from library.cli import SCRIPTS
from library.config.data import UNSUPPORTED
from library.config.documents import read_json
from library.config.errors import ConfigError
from library.config.optimizer import OPTIMIZER_NAMES
from library.config.options import Option, all_options, canonical_names
from library.config.resolved import toml_value
from library.config.unsupported import REASONS, RENAMED
from library.families import FAMILIES, family_options
from library.io.atomic import write_text
from tools.simpletuner_data import Datasets, translate_backends
from tools.simpletuner_lycoris import translate_lycoris

_OPTIMIZERS = {
    "adamw_bf16": "AdamW",
    "optimi-adamw": "AdamW",
    "adamw": "AdamW",
    "ao-adamw8bit": "AdamW8bit",
    "bnb-adamw8bit": "AdamW8bit",
    "bnb-adamw8bit-paged": "PagedAdamW8bit",
    "bnb-adamw-paged": "PagedAdamW",
    "optimi-stableadamw": "StableAdamW",
    "optimi-lion": "Lion",
    "bnb-lion8bit": "Lion8bit",
    "bnb-lion8bit-paged": "PagedLion8bit",
    "prodigy": "Prodigy",
    "adafactor": "AdaFactor",
}
_NO_CHANGE = ("no_change", "", None, "none", "None")
_PROMPT_KEYS = (
    "validation_prompt",
    "user_prompt_library",
    "validation_resolution",
    "validation_guidance",
    "validation_num_inference_steps",
    "validation_negative_prompt",
    "validation_seed",
    "num_validation_images",
    "validation_preview",
    "validation_preview_steps",
)
_ANSWERED = (
    "model_type",
    "model_family",
    "data_backend_config",
    "instance_prompt",
    "lora_type",
    "lycoris_config",
    *_PROMPT_KEYS,
)
_VALIDATION_STEPS = 100
_LYCORIS_FILE = "config/lycoris_config.json"
_BY_DEFAULT = "what SimpleTuner does by default"
_LIBRARY_OF_HOSTED_MODELS = "a name on the Hugging Face Hub; fetch it (hf download) and put the folder here"


@dataclass
class Translation:
    """What became of a ``config.json``.

    Attributes:
        script: The script that trains it.
        values: Options of the run.
        left_out: What has no counterpart, a line each.
        notes: What was written in another way, a line each.
    """

    script: str
    values: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """This runs the tool and returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", help="SimpleTuner's config.json")
    parser.add_argument("--data", help="its multidatabackend.json (default: the one that config.json names)")
    parser.add_argument("--output_dir", default=".", help="where run.toml, dataset.toml and prompts.txt are written")
    arguments = parser.parse_args(argv)
    try:
        for line in import_configuration(Path(arguments.config), arguments.data, Path(arguments.output_dir)):
            print(line)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def import_configuration(config_path: Path, data_path: str | None, output_dir: Path) -> Iterator[str]:
    """This writes the files, and yields what a person should know, a line each.

    Raises:
        ConfigError: A file is missing, is no JSON, or describes no model that can be trained.
    """
    config = {str(key).lstrip("-"): value for key, value in _read_json(config_path, dict).items()}
    backends = _read_json(_data_file(config_path, data_path or config.get("data_backend_config")), list)
    translation = translate_config(config, config_path.parent)
    datasets = translate_backends(backends, adapters=translation.script.endswith("_network.py"))
    if not datasets.tables:
        raise ConfigError(
            "no backend with pictures is left; the lines above say why"
            if datasets.left_out
            else "no backend with pictures"
        )
    for path in (run_file := output_dir / "run.toml", dataset_file := output_dir / "dataset.toml"):
        if path.exists():
            raise ConfigError(f"{path} is there already; name another --output_dir")
    translation.values["dataset_config"] = str(dataset_file)
    prompts = list(_prompts(config, config_path.parent, translation))
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if prompts:
            write_text(output_dir / "prompts.txt", "".join(f"{line}\n" for line in prompts))
            translation.values["sample_prompts"] = str(output_dir / "prompts.txt")
            if not {"sample_every_n_steps", "sample_every_n_epochs"} & set(translation.values):
                translation.values["sample_every_n_steps"] = _VALIDATION_STEPS
                translation.notes.append(f"sample_every_n_steps = {_VALIDATION_STEPS}: {_BY_DEFAULT}")
            if str(config.get("validation_preview", "")).lower() == "true":
                translation.values["preview_every"] = config.get("validation_preview_steps", 1)
            yield f"wrote {output_dir / 'prompts.txt'}: {len(prompts)} prompts"
        write_text(dataset_file, dataset_toml(datasets))
        write_text(run_file, run_toml(translation))
    except OSError as error:
        raise ConfigError(f"{output_dir}: can't be written ({error.strerror})") from None
    yield f"wrote {dataset_file}: {len(datasets.tables)} datasets"
    yield f"wrote {run_file}: {len(translation.values)} options"
    for title, lines in (
        ("written in another way", [*translation.notes, *datasets.notes]),
        ("without counterpart, left out", [*translation.left_out, *datasets.left_out]),
    ):
        yield f"{title}: {len(lines)}"
        yield from (f"  {line}" for line in lines)
    yield f"try it: python {translation.script} --config_file {run_file} --dry_run"


def translate_config(config: Mapping[str, Any], folder: Path = Path()) -> Translation:
    """This turns the options of ``config.json``, without their dashes, into ours.

    Args:
        config: The options.
        folder: Where the file is, for others that it names.

    Raises:
        ConfigError: The model is none that is trained here.
    """
    family, adapters = config.get("model_family"), config.get("model_type", "full") != "full"
    family = "sd3" if family == "sd35" else family
    if family not in FAMILIES:
        raise ConfigError(f"model_family {family}: known here are {', '.join(FAMILIES)}")
    script = SCRIPTS[family_options(family).SCRIPTS["adapter" if adapters else "full"]]
    result = Translation(f"{script.name}.py")
    options = all_options(script.groups)
    names = canonical_names(options)
    for key, value in config.items():
        if key in _ANSWERED:
            continue
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        name = names.get(key) or names.get(RENAMED.get(key, ""))
        if key == "optimizer":
            _optimizer(str(value), result)
        elif key.endswith("_precision") and value in _NO_CHANGE:
            continue
        elif key == "resume_from_checkpoint" and value == "latest":
            _add(options["resume"], "resume", key, "auto", result)
        elif key == "resume_from_checkpoint":
            result.left_out.append(f"{key} {value}: states of SimpleTuner can't be resumed; --resume takes ours")
        elif name is None:
            if value is False or value in _NO_CHANGE:
                continue  # off there, and not there here
            reason = REASONS.get(key) or UNSUPPORTED.get(key)
            result.left_out.append(f"{key} {json.dumps(value)}" + (f": {reason}" if reason else ""))
        else:
            _add(options[name], name, key, value, result)
    _average(config, result)
    if adapters:
        _lycoris(config, folder, family, result)
    _settle(config, family, adapters, options, result)
    return result


def _add(option: Option, name: str, key: str, value: Any, result: Translation) -> None:
    try:
        if option.many and isinstance(value, str):
            value = [json.loads(part) for part in value.strip("[]").split(",")]
        if option.kind in (int, float) and isinstance(value, str):
            value = option.kind(value)
        option.from_toml(value)
    except ValueError as error:
        result.left_out.append(f"{key} {json.dumps(value)}: {error}")
        return
    result.values[name] = value


def _optimizer(value: str, result: Translation) -> None:
    known = {name.lower(): name for name in OPTIMIZER_NAMES}
    name = _OPTIMIZERS.get(value) or known.get(value.lower())
    if name is None or name not in OPTIMIZER_NAMES:
        result.left_out.append(f"optimizer {value}: known here are {', '.join(OPTIMIZER_NAMES)}; AdamW is used")
        return
    result.values["optimizer_type"] = name
    if value == "adamw_bf16":
        result.values |= {"full_bf16": True, "stochastic_rounding": True}
        result.notes.append("optimizer adamw_bf16 is AdamW with --full_bf16 --stochastic_rounding here")
    elif name.lower() != value.lower():
        result.notes.append(f"optimizer {value} is {name} here")


def _lycoris(config: Mapping[str, Any], folder: Path, family: str, result: Translation) -> None:
    """Writes down the adapter's settings where SimpleTuner takes them from LyCORIS's file instead of from options."""
    kind, named = config.get("lora_type", "standard"), config.get("lycoris_config") or _LYCORIS_FILE
    if kind != "lycoris":
        if kind != "standard":
            result.left_out.append(f"lora_type {kind}: an ordinary LoRA is trained")
        if config.get("lycoris_config"):
            result.left_out.append(f"lycoris_config {named}: lora_type isn't lycoris")
        return
    path = _found(named, folder)
    if path is None:
        raise ConfigError(f"lycoris_config {named}: no such file, and lora_type is lycoris")
    lycoris = translate_lycoris(_read_json(path, dict), family)
    for name in ("network_dim", "network_alpha"):
        result.values.pop(name, None)
    result.values |= lycoris.values
    result.left_out += lycoris.left_out
    result.notes.append(f"lycoris_config {named}: network_args {' '.join(lycoris.values['network_args'])}")


def _average(config: Mapping[str, Any], result: Translation) -> None:
    """Leaves out the moving average's settings where there is none, and says what samples use where there is one."""
    values = result.values
    if values.get("use_ema") and "schedulefree" in values.get("optimizer_type", "").lower():
        del values["use_ema"]
        result.left_out.append(f"use_ema: {values['optimizer_type']} averages the weights by itself")
    if values.get("use_ema"):
        draws = config.get("validation_prompt") or config.get("user_prompt_library")
        if draws and "ema_validation" not in values:
            values["ema_validation"] = "comparison"
            result.notes.append(f'ema_validation = "comparison": {_BY_DEFAULT}')
        return
    for name in [name for name in values if name.startswith("ema_")]:
        result.left_out.append(f"{name} {json.dumps(values.pop(name))}: nothing is averaged without use_ema")


def _settle(
    config: Mapping[str, Any], family: str, adapters: bool, options: Mapping[str, Option], result: Translation
) -> None:
    """Writes down what SimpleTuner does when nothing is said and where the default here is another."""
    values = result.values
    model = str(values.get("pretrained_model_name_or_path", ""))
    if model and not os.path.exists(model) and model.count("/") == 1:
        result.notes.append(f"pretrained_model_name_or_path {model}: {_LIBRARY_OF_HOSTED_MODELS}")
    defaults: dict[str, Any] = {"weighting_scheme": "sigma_sqrt", "mixed_precision": "bf16"}
    if not values.get("flow_use_uniform_schedule"):
        defaults["timestep_sampling"] = "sigmoid"
    if not values.get("flow_schedule_auto_shift"):
        defaults["training_shift"] = 3.0
    if family == "sd3":
        defaults["t5xxl_max_token_length"] = 154
    if adapters and "full_matrix=true" not in values.get("network_args", ()):
        defaults |= {"network_dim": 16, "network_alpha": float(values.get("network_dim", 16))}
    if adapters:
        defaults["network_train_unet_only"] = True
    caches_latents = not config.get("vae_cache_disable") and not config.get("vae_cache_ondemand")
    defaults |= {"cache_latents_to_disk": caches_latents, "cache_text_encoder_outputs_to_disk": True}
    for name, value in defaults.items():
        if name in options and name not in values and value is not False:
            values[name] = value
            result.notes.append(f"{name} = {toml_value(value)}: {_BY_DEFAULT}")


def _prompts(config: Mapping[str, Any], folder: Path, result: Translation) -> Iterator[str]:
    """The lines of the prompt file: every prompt at every validation resolution."""
    texts = [config["validation_prompt"]] if config.get("validation_prompt") else []
    if library := config.get("user_prompt_library"):
        found = _found(library, folder)
        if found is None:
            result.left_out.append(f"user_prompt_library {library}: no such file; add its prompts to prompts.txt")
        else:
            texts += [str(text) for text in _read_json(found, dict).values()]
    tail = ""
    for key, flag in (
        ("validation_guidance", "l"),
        ("validation_num_inference_steps", "s"),
        ("validation_seed", "d"),
        ("validation_negative_prompt", "n"),
    ):
        if config.get(key) not in (None, ""):
            tail += f" --{flag} {config[key]}"
    sizes = [size for size in str(config.get("validation_resolution") or "").replace(" ", "").split(",") if size]
    for text in texts:
        for size in sizes or [""]:
            width, _, height = size.partition("x")
            yield f"{text}" + (f" --w {width} --h {height or width}" if size else "") + tail
    if not texts and any(config.get(key) for key in _PROMPT_KEYS):
        result.left_out.append("validation_*: there is no prompt, so no samples are drawn; see --sample_prompts")


def dataset_toml(datasets: Datasets) -> str:
    """The dataset TOML."""
    lines = ["# Translated from SimpleTuner's multidatabackend.json"]
    for name, table in zip(datasets.names, datasets.tables):
        lines += ["", f"# {name}", "[[datasets]]"]
        lines += [f"{key} = {toml_value(value)}" for key, value in table.items() if key != "subsets"]
        for subset in table["subsets"]:
            lines += ["", "  [[datasets.subsets]]"]
            lines += [f"  {key} = {toml_value(value)}" for key, value in subset.items()]
    return "\n".join([*lines, ""])


def run_toml(translation: Translation) -> str:
    """The run TOML, for ``--config_file``."""
    lines = ["# Translated from SimpleTuner's config.json", f"# python {translation.script} --config_file <this file>"]
    return "\n".join([*lines, *(f"{key} = {toml_value(value)}" for key, value in translation.values.items()), ""])


def _data_file(config_path: Path, named: str | None) -> Path:
    if named is None:
        return config_path.with_name("multidatabackend.json")
    return _found(named, config_path.parent) or Path(named)


def _found(named: str, folder: Path) -> Path | None:
    """A file that a configuration in ``folder`` names: as it stands, from the folder, or from the one above it."""
    places = (Path(named), folder / named, folder.parent / named)
    return next((path for path in places if path.is_file()), None)


def _read_json(path: Path, kind: type[dict] | type[list]) -> Any:
    document = read_json(path)
    entries = document if isinstance(document, list) else []
    if not isinstance(document, kind) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: expected {'an object' if kind is dict else 'a list of objects'}")
    return document


if __name__ == "__main__":
    sys.exit(main())
