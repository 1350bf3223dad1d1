"""What a run's data comes down to, in a form that a person can read and a later run can compare."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.plan import BatchPlan
from library.training.data import TrainingData

_NUMBERS = {
    "pictures": "pictures",
    "steps_per_epoch": "steps per epoch",
    "micro_batches_per_epoch": "micro-batches per epoch",
    "micro_batches_per_step": "micro-batches per step (processes times accumulation)",
}
_DIGESTS = {"names": "names of pictures", "contents": "contents of pictures", "captions": "captions"}

# Where things lie says nothing of what they are: names, contents and captions are compared themselves.
_PLACES = {"image_dir", "metadata_file", "conditioning_data_dir", "filename_column", "caption_column"}
_PLACES |= {"caption_extension", "caption_strategy"}


def summarize_data(
    datasets: Iterable[DatasetConfig], data: TrainingData, plan: BatchPlan, *, micro_batches_per_step: int
) -> dict[str, Any]:
    """This says what is trained on, in types that JSON knows.

    Args:
        datasets: The configuration of the data.
        data: What was found.
        plan: The steps.
        micro_batches_per_step: Processes times accumulation.
    """
    samples = data.discovery.samples
    training = {index: dataset for index, dataset in enumerate(datasets) if dataset.role == "train"}
    summary = {
        "pictures": len(samples),
        "steps_per_epoch": plan.steps_per_epoch,
        "micro_batches_per_epoch": plan.micro_batches_per_epoch,
        "micro_batches_per_step": micro_batches_per_step,
        "names": _digest(sample.key for sample in samples),
        "contents": _digest(f"{sample.content} {sample.mask_content}{sample.control_content}" for sample in samples),
        "captions": _digest("\x1f".join(sample.captions) for sample in samples),
        "datasets": {
            str(index): {**_settings(dataset), "buckets": data.buckets(index)} for index, dataset in training.items()
        },
    }
    return json.loads(json.dumps(summary))


def data_changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What differs between two summaries, each with both values.

    Args:
        now: Of the run that goes on.
        before: Of the run that the state was saved from.
    """
    changes = [
        f"{title} {now[name]} (the state: {before[name]})"
        for name, title in _NUMBERS.items()
        if now[name] != before[name]
    ]
    if now["pictures"] == before["pictures"]:  # otherwise these differ for that reason
        changes += [
            f"{title}, with the hash {now[name]} (the state: {before[name]})"
            for name, title in _DIGESTS.items()
            if now[name] != before[name]
        ]
    if now["datasets"].keys() != before["datasets"].keys():
        return [*changes, f"datasets {', '.join(now['datasets'])} (the state: {', '.join(before['datasets'])})"]
    for index, settings in now["datasets"].items():
        changes += _differences(f"datasets[{index}]", settings, before["datasets"][index])
    return changes


def _differences(place: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    for name in [name for name in now if name in before]:  # another version may know more settings
        if name == "subsets" and len(now[name]) == len(before[name]):
            for number, (own, other) in enumerate(zip(now[name], before[name])):
                yield from _differences(f"{place}.subsets[{number}]", own, other)
        elif name == "subsets":
            yield f"subsets of {place} {len(now[name])} (the state: {len(before[name])})"
        elif now[name] != before[name]:
            yield f"{place}.{name} {_shown(now[name])} (the state: {_shown(before[name])})"


def _settings(config: DatasetConfig | SubsetConfig) -> dict[str, Any]:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, DatasetConfig):
        settings["subsets"] = [_settings(subset) for subset in config.subsets]
    return {name: value for name, value in settings.items() if name not in _PLACES}


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {count}" for name, count in value.items()) or "none"
    return "unset" if value is None else str(value)
