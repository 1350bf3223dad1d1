"""What a run says of itself: at its start to people, and in its files to whoever opens them."""

import os
import secrets
import time
from typing import Any

from tqdm import tqdm

from library.config.run import RunConfig
from library.data.plan import BatchPlan
from library.data.report import DataReport, report_data
from library.families.protocols import ModelFamily, TextEncodingStrategy
from library.training.data import TrainingData, file_index
from library.training.run import Run


def run_facts(config: RunConfig, plan: BatchPlan, max_steps: int, optimizer_label: str, seed: int) -> dict[str, Any]:
    """Facts of the run for the metadata, without the ``ss_`` prefix."""
    return {
        "session_id": secrets.randbelow(2**32),
        "training_started_at": time.time(),
        "output_name": config.saving.output_name,
        "seed": seed,
        "optimizer": optimizer_label,
        "prior_loss_weight": config.data.prior_loss_weight if has_regularisation(config) else None,
        "max_train_steps": max_steps,
        "num_batches_per_epoch": plan.micro_batches_per_epoch,
        "num_epochs": plan.epoch_of(max_steps - 1) + 1,
        "sd_model_name": os.path.basename(str(config.model.pretrained_model_name_or_path).rstrip("/")),
    }


def has_regularisation(config: RunConfig) -> bool:
    """Whether there are regularisation pictures."""
    return any(subset.is_reg for dataset in config.datasets for subset in dataset.subsets)


def data_report(
    config: RunConfig,
    data: TrainingData,
    plan: BatchPlan,
    family: ModelFamily,
    text: TextEncodingStrategy,
    processes: int,
) -> DataReport:
    """What is said about the data; before anything is cached, for it tells what the cache needs.

    Captions that no run has seen before are tokenized, which takes a second for some thousands.
    """
    with tqdm(desc="looking at new captions", unit="caption", dynamic_ncols=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        return report_data(
            config,
            data.discovery,
            data.placements,
            data.validation_placements,
            plan,
            latents=family.latents.format,
            text_numbers=family.description.text_numbers,
            windows=text.windows(),
            processes=processes,
            index=file_index(config),
            progress=progress,
        )


def run_lines(run: Run) -> list[str]:
    """What is trained, and on what, for the log."""
    accelerator, description = run.accelerator, run.family.description
    groups = []
    for index, group in enumerate(run.optimizer.param_groups):
        count, rate = sum(parameter.numel() for parameter in group["params"]), group.get("initial_lr", group["lr"])
        groups.append(f"{group.get('name', index)} ({count:,} numbers at learning rate {rate})")
    return [
        f"model: {description.title}, {description.parameters:,} parameters, {run.weight_dtype}",
        f"trained: {', '.join(groups)}",
        f"machine: {accelerator.device.type}, precision {accelerator.mixed_precision}, seed {run.seed}",
    ]
