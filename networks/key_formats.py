"""Spellings of an adapter file: kohya's (ComfyUI and most programs) and diffusers' (PEFT keys).

kohya: ``<prefix>_<path with underscores>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``. The strength is
alpha / rank; without an alpha it is 1. A LoKr has ``.lokr_w1`` and ``.lokr_w2``, or in place of either ``_a`` and
``_b``; a LoHa ``.hada_w1_a``, ``.hada_w1_b``, ``.hada_w2_a``, ``.hada_w2_b``. LyCORIS's own prefix, ``lycoris_`` for a
denoiser alone, is read too. diffusers knows only LoRA.

diffusers: ``<component>.<path>.lora_A.weight`` (down), ``.lora_B.weight`` (up); the strength is 1 unless the metadata
entry ``lora_adapter_metadata`` says otherwise. It has three layers where ours is fused (one ``qkv``):

* fused to separate is exact: all three share ``down``, and ``up`` is cut in three.
* separate to fused is exact at the same rank where the three share ``down`` and their strength. Otherwise ``down`` are
  stacked and ``up`` become the blocks of a block-diagonal matrix: exact too, at the sum of the ranks.
"""

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.config.documents import parse_json
from library.config.errors import ConfigError
from library.config.messages import name_shown, shown
from library.records import AdapterTargets, FusedLinear
from networks.loha import LohaWeights
from networks.lokr import LokrWeights
from networks.lora_layer import LoraWeights
from networks.methods import UpdateWeights
from networks.targeting import DENOISER, kohya_name, layer_name

KOHYA, DIFFUSERS = "kohya", "diffusers"
PEFT_METADATA = "lora_adapter_metadata"

LYCORIS_PREFIX = "lycoris"

_WRAPPER = "text_model."
"""What transformers' CLIP text encoders are wrapped in, or not, by version and class. PEFT compares the ends of names,
so without it in the metadata a layer is found either way."""

_MOST_VALUES = 1_000_000
_MOST_REPEATS = 3
_LONGEST_PATTERN = 300
_REPEATED_GROUP = re.compile(r"\)[*+?{]|[*+?}][*+{]|\(\?|\\\d")
"""What lets a pattern take time that grows exponentially with the text."""

_LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_LOHA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KOHYA_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"} | {
    part: part for part in (*_LOKR_PARTS, *_LOHA_PARTS)
}
_KOHYA_KEY = re.compile(rf"(?P<name>[^.]+)\.(?P<part>{'|'.join(map(re.escape, _KOHYA_PARTS))})")
_DIFFUSERS_KEY = re.compile(
    r"(?P<name>.+?)\.(?P<part>lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up|alpha)"
    r"(?:\.default)?(?:\.weight)?"
)
_DIFFUSERS_PARTS = {
    "lora_A": "down",
    "lora.down": "down",
    "lora_linear_layer.down": "down",
    "lora_B": "up",
    "lora.up": "up",
    "lora_linear_layer.up": "up",
    "alpha": "alpha",
}
_OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".hada_t": "Tucker LoHa",
    ".lokr_t": "Tucker LoKr",
    ".lora_mid": "Tucker LoCon",
    ".on_input": "IA3",
    ".a1.weight": "GLoRA",
    ".diff": "LyCORIS full",
    ".oft_": "OFT",
    "lora_B.bias": "LoRA with biases",
}


@dataclass(frozen=True)
class DiffusersPlace:
    """Where diffusers keeps one layer of ours.

    Attributes:
        name: Our layer's name in kohya's spelling.
        prefix: Of diffusers' keys: ``transformer``.
        layer: Diffusers' layers and how their rows lie.
    """

    name: str
    prefix: str
    layer: FusedLinear

    @property
    def parts(self) -> tuple[str, ...]:
        """Diffusers' layers, prefix included."""
        return tuple(f"{self.prefix}.{part}" for part in self.layer.parts)


def diffusers_places(targets: Mapping[str, AdapterTargets]) -> dict[str, DiffusersPlace]:
    """This maps our layers' names to their places in diffusers, for every layer that has one."""
    places = (
        DiffusersPlace(layer_name(target, path), target.diffusers_prefix, layer)
        for target in targets.values()
        if target.diffusers_prefix
        for path, layer in target.fused.items()
    )
    return {place.name: place for place in places}


def detect_format(keys: Iterable[str], targets: Mapping[str, AdapterTargets], source: str) -> str:
    """This tells which spelling a file's keys are in.

    Args:
        keys: The file's tensor names.
        targets: The family's, by component.
        source: The file, for the error.

    Raises:
        ConfigError: It is neither, or another kind of adapter.
    """
    keys = list(keys)
    for marker, method in _OTHER_METHODS.items():
        if any(marker in key for key in keys):
            raise ConfigError(f"{source} is a {method} adapter; only LoRA, LoKr and LoHa can be read")
    places = diffusers_places(targets)
    theirs = {kohya_name(LYCORIS_PREFIX, part) for place in places.values() for part in place.layer.parts}
    theirs = {name for name in theirs if _own_name(name, targets) not in places}
    if elsewhere := [key for key in keys if _is_factor(key) and not _is_kohya_factor(key, theirs)]:
        raise ConfigError(
            f"{source} has a LoKr or LoHa for diffusers' layers ({elsewhere[0]}), whose separate q, k and v have no "
            f"place in this model's fused layers; only kohya's and LyCORIS's ({_expected(targets)}) can be read"
        )
    prefixes = {target.diffusers_prefix for target in targets.values() if target.diffusers_prefix}
    if any(_KOHYA_KEY.fullmatch(key) and _component(key, targets) for key in keys):
        return KOHYA
    if any(_DIFFUSERS_KEY.fullmatch(key) and key.split(".")[0] in prefixes for key in keys):
        return DIFFUSERS
    raise ConfigError(
        f"{source} is not an adapter for this model: its keys look like {_some(sorted(keys))}; expected "
        f"{_expected(targets)}, or " + ", ".join(f"{prefix}.*" for prefix in sorted(prefixes))
    )


def components_of(names: Iterable[str], targets: Mapping[str, AdapterTargets]) -> set[str]:
    """The components that layers in kohya's spelling belong to."""
    return {component for name in names if (component := _component(name, targets))}


def read_weights(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], targets: Mapping[str, AdapterTargets], source: str
) -> dict[str, UpdateWeights]:
    """This reads an adapter in either spelling.

    Args:
        tensors: The file's tensors.
        metadata: The file's metadata.
        targets: The family's, by component.
        source: The file, for errors.

    Returns:
        By layer name in kohya's spelling.

    Raises:
        ConfigError: The file isn't an adapter for this model, is incomplete, or contradicts itself.
    """
    if detect_format(tensors, targets, source) == KOHYA:
        parts = _by_layer(tensors, _KOHYA_KEY, _KOHYA_PARTS, source)
        if strange := sorted(name for name in parts if not _component(name, targets)):
            raise ConfigError(
                f"{source}: {len(strange)} layers are not this model's: {_some(strange)}; expected {_expected(targets)}"
            )
        return {_own_name(name, targets): _weights_of_any_kind(name, given, source) for name, given in parts.items()}
    return {**_from_diffusers(tensors, metadata, targets, source)}


def to_kohya(weights: Mapping[str, UpdateWeights]) -> dict[str, Tensor]:
    """This spells an adapter kohya's way."""
    tensors: dict[str, Tensor] = {}
    for name, layer in weights.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer.tensors().items()}
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def to_diffusers(
    weights: Mapping[str, LoraWeights], targets: Mapping[str, AdapterTargets]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """This spells an adapter diffusers' way.

    The strength is multiplied into ``down``, so that readers that know no alpha apply the right one; ``down`` is not
    small, so fp16 keeps it exact enough. The metadata says the same again, because ranks that differ between layers
    would be misread without it by some versions.

    Returns:
        Tensors, and metadata entries for the file.

    Raises:
        ConfigError: Diffusers has no place for a layer.
    """
    places = diffusers_places(targets)
    if homeless := sorted(set(weights) - set(places)):
        raise ConfigError(
            f"diffusers has no place for {len(homeless)} layers, such as {homeless[0]}; use kohya's spelling for them "
            "(--save_format kohya)"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    for name, layer in weights.items():
        place = places[name]
        down = (layer.down.float() * (layer.alpha / layer.rank)).to(layer.down.dtype)
        up = _swapped(layer.up) if place.layer.swap_halves else layer.up
        for part, path, rows in zip(place.parts, place.layer.parts, up.chunk(len(place.parts))):
            tensors[f"{part}.lora_A.weight"] = down
            tensors[f"{part}.lora_B.weight"] = rows
            ranks.setdefault(place.prefix, {})[path.removeprefix(_WRAPPER)] = layer.rank
    return tensors, {"format": "pt", PEFT_METADATA: json.dumps(_peft_config(ranks), sort_keys=True)}


def _peft_config(ranks: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for prefix, of_layer in ranks.items():
        common = Counter(of_layer.values()).most_common(1)[0][0]
        others = {path: rank for path, rank in of_layer.items() if rank != common}
        config |= {
            f"{prefix}.r": common,
            f"{prefix}.lora_alpha": common,
            f"{prefix}.rank_pattern": others,
            f"{prefix}.alpha_pattern": others,
            f"{prefix}.target_modules": sorted(of_layer),
        }
    return config


def _from_diffusers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], targets: Mapping[str, AdapterTargets], source: str
) -> dict[str, LoraWeights]:
    given = _by_layer(tensors, _DIFFUSERS_KEY, _DIFFUSERS_PARTS, source)
    places = diffusers_places(targets).values()
    if unknown := sorted(set(given) - {part for place in places for part in place.parts}):
        raise ConfigError(f"{source}: {len(unknown)} layers are not this model's: {_some(unknown)}")
    try:
        config = parse_json(metadata.get(PEFT_METADATA) or "{}", most_values=_MOST_VALUES)
        if not isinstance(config, dict):
            raise ValueError("it is no table")
    except ValueError as error:
        raise ConfigError(f"{source}: its metadata entry {PEFT_METADATA} is damaged ({error})") from error
    layers = {name: _weights(name, parts, config, source) for name, parts in given.items()}
    return {
        place.name: _joined(place, [layers.get(part) for part in place.parts], source)
        for place in places
        if any(part in layers for part in place.parts)
    }


def _joined(place: DiffusersPlace, parts: Sequence[LoraWeights | None], source: str) -> LoraWeights:
    """One layer of ours from diffusers' layers; those without an adapter (None) contribute zero rows."""
    present = [part for part in parts if part is not None]
    first = present[0]
    if len(parts) == 1:
        return first._replace(up=_swapped(first.up)) if place.layer.swap_halves else first
    if any(part.up.shape[0] != first.up.shape[0] for part in present):
        raise ConfigError(f"{source}: {', '.join(place.parts)} don't have the same size; the file is damaged")
    nothing = torch.zeros_like(first.up)
    if all(torch.equal(part.down, first.down) and part.alpha == first.alpha for part in present):
        up = torch.cat([nothing if part is None else part.up for part in parts])
        return LoraWeights(first.down, up, first.alpha)
    columns = []
    for owner in present:
        # Each part's own strength goes into its up, because the joint layer has one strength, 1.
        scaled = (owner.up.float() * (owner.alpha / owner.rank)).to(owner.up.dtype)
        columns.append(torch.cat([scaled if part is owner else torch.zeros_like(scaled) for part in parts]))
    up = torch.cat(columns, dim=1)
    return LoraWeights(torch.cat([part.down for part in present]), up, float(up.shape[1]))


def _by_layer(
    tensors: Mapping[str, Tensor], pattern: re.Pattern[str], names: Mapping[str, str], source: str
) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            strange.append(key)
        else:
            layers.setdefault(match["name"], {})[names[match["part"]]] = tensor
    if strange:
        raise ConfigError(f"{source}: {len(strange)} keys are not an adapter's: {_some(sorted(strange))}")
    return layers


def _weights(name: str, parts: Mapping[str, Tensor], peft_config: Mapping[str, Any] | None, source: str) -> LoraWeights:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise ConfigError(f"{source}: {name} has no {missing[0]} weights; the file is incomplete")
    down, up = parts["down"], parts["up"]
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0] or down.shape[0] == 0:
        raise ConfigError(
            f"{source}: {name} has down {list(down.shape)} and up {list(up.shape)}, which have no rank in common"
        )
    rank = down.shape[0]
    if "alpha" in parts:
        alpha = _number(name, parts["alpha"], source)
    else:
        alpha = _peft_alpha(name, rank, peft_config, source) if peft_config else float(rank)
    _check_finite(name, (down, up, torch.tensor(alpha)), source)
    return LoraWeights(down, up, alpha)


def _weights_of_any_kind(name: str, parts: Mapping[str, Tensor], source: str) -> UpdateWeights:
    kinds = {part.split("_")[0] for part in parts if part != "alpha"}
    if kinds == {"lokr"}:
        return _lokr_weights(name, parts, source)
    if kinds == {"hada"}:
        return _loha_weights(name, parts, source)
    if kinds & {"lokr", "hada"}:
        raise ConfigError(f"{source}: {name} mixes kinds of adapters ({', '.join(sorted(parts))}); the file is damaged")
    return _weights(name, parts, None, source)


def _lokr_weights(name: str, parts: Mapping[str, Tensor], source: str) -> LokrWeights:
    factors = []
    for factor in ("lokr_w1", "lokr_w2"):
        pair = (f"{factor}_a", f"{factor}_b")
        if (factor in parts) == any(part in parts for part in pair):
            state = "twice" if factor in parts else "not at all"
            raise ConfigError(f"{source}: {name} has {factor} {state}; the file is damaged")
        given: tuple[Tensor, ...] = (parts[factor],) if factor in parts else _low_rank_pair(name, parts, *pair, source)
        if given[0].ndim not in (2, 4) or given[0].numel() == 0:
            raise ConfigError(f"{source}: {name} has {factor} of size {list(given[0].shape)}; the file is damaged")
        factors.append(given)
    weights = LokrWeights(factors[0], factors[1], 1.0)
    if len(weights.w1) == 2 or len(weights.w2) == 2:
        weights = weights._replace(alpha=_alpha(name, parts, weights.rank, source))
    _check_finite(name, (*weights.tensors().values(), torch.tensor(weights.alpha)), source)
    return weights


def _loha_weights(name: str, parts: Mapping[str, Tensor], source: str) -> LohaWeights:
    first = _low_rank_pair(name, parts, "hada_w1_a", "hada_w1_b", source)
    second = _low_rank_pair(name, parts, "hada_w2_a", "hada_w2_b", source)
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        raise ConfigError(f"{source}: {name} has two products of different sizes; the file is damaged")
    (w1_a, w1_b), (w2_a, w2_b) = first, second
    weights = LohaWeights(w1_a, w1_b, w2_a, w2_b, _alpha(name, parts, w1_b.shape[0], source))
    _check_finite(name, (*first, *second, torch.tensor(weights.alpha)), source)
    return weights


def _low_rank_pair(name: str, parts: Mapping[str, Tensor], left: str, right: str, source: str) -> tuple[Tensor, Tensor]:
    for part in (left, right):
        if part not in parts:
            raise ConfigError(f"{source}: {name} has no {part}; the file is incomplete")
    a, b = parts[left], parts[right]
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or b.shape[0] == 0:
        raise ConfigError(
            f"{source}: {name} has {left} {list(a.shape)} and {right} {list(b.shape)}, which have no rank in common"
        )
    return a, b


def _check_finite(name: str, tensors: Iterable[Tensor], source: str) -> None:
    if not all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors):
        raise ConfigError(f"{source}: {name} has numbers that are not finite; the adapter is broken")


def _is_factor(key: str) -> bool:
    return ".lokr_w" in key or ".hada_w" in key


def _is_kohya_factor(key: str, not_ours: Container[str]) -> bool:
    match = _KOHYA_KEY.fullmatch(key)
    return match is not None and match["name"] not in not_ours


def _alpha(name: str, parts: Mapping[str, Tensor], rank: int, source: str) -> float:
    return _number(name, parts["alpha"], source) if "alpha" in parts else float(rank)


def _number(name: str, tensor: Tensor, source: str) -> float:
    if tensor.numel() != 1 or tensor.is_complex():
        raise ConfigError(f"{source}: {name} has an alpha that is no number; the file is damaged")
    return float(tensor)


def _peft_alpha(name: str, rank: int, config: Mapping[str, Any], source: str) -> float:
    """The alpha by kohya's rule (strength alpha / rank) that gives the strength of PEFT's configuration."""
    prefix, path = name.split(".", 1)
    patterns = config.get(f"{prefix}.alpha_pattern") or {}
    try:
        matching = (value for key, value in patterns.items() if _matches(key, path))
        alpha = float(next(matching, config.get(f"{prefix}.lora_alpha", rank)))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{source}: its metadata entry {PEFT_METADATA} is damaged ({error})") from None
    return alpha * rank**0.5 if config.get(f"{prefix}.use_rslora") else alpha


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern of PEFT's, a regular expression from the file, is that of a layer.

    Raises:
        ValueError: It is none, or one that could take for ever.
    """
    repeats = sum(map(pattern.count, "*+?{"))
    if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or _REPEATED_GROUP.search(pattern):
        raise ValueError(f"{shown(pattern)} is more than the name of a layer")
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise ValueError(f"{shown(pattern)}: {error}") from None


def _own_name(name: str, targets: Mapping[str, AdapterTargets]) -> str:
    """A layer's name with our prefix, where LyCORIS's stood."""
    if name.startswith(f"{LYCORIS_PREFIX}_") and DENOISER in targets:
        return targets[DENOISER].prefix + name.removeprefix(LYCORIS_PREFIX)
    return name


def _component(name: str, targets: Mapping[str, AdapterTargets]) -> str | None:
    name = _own_name(name, targets)
    matching = (component for component, target in targets.items() if name.startswith(f"{target.prefix}_"))
    return next(matching, None)


def _expected(targets: Mapping[str, AdapterTargets]) -> str:
    return ", ".join(f"{target.prefix}_*" for target in targets.values())


def _swapped(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(name_shown, names[:3])) + (", ..." if len(names) > 3 else "")
