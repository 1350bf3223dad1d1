"""What a run says of itself: at its start to people, and in its files to whoever opens them."""

import os
import secrets
import time
from typing import Any

from library.config.run import RunConfig
from library.data.plan import BatchPlan
from library.training.data import TrainingData
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
        "num_epochs": -(-max_steps // plan.steps_per_epoch),
        "sd_model_name": os.path.basename(str(config.model.pretrained_model_name_or_path).rstrip("/")),
    }


def has_regularisation(config: RunConfig) -> bool:
    """Whether there are regularisation pictures."""
    return any(subset.is_reg for dataset in config.datasets for subset in dataset.subsets)


def report_lines(run: Run, data: TrainingData) -> list[str]:
    """What is about to happen, for the log."""
    plan, accelerator = run.plan, run.accelerator
    lines = [
        f"model: {run.family.description.title}, {run.family.description.parameters:,} parameters, {run.weight_dtype}",
    ]
    for index, dataset in enumerate(run.config.datasets):
        buckets = ", ".join(f"{name}: {count}" for name, count in sorted(data.buckets(index).items()))
        own = sum(1 for sample in data.discovery.samples if sample.dataset == index)
        lines.append(f"dataset {index}: {own} images at {dataset.resolution}, visits per bucket and epoch: {buckets}")
    groups = []
    for index, group in enumerate(run.optimizer.param_groups):
        count, rate = sum(parameter.numel() for parameter in group["params"]), group.get("initial_lr", group["lr"])
        groups.append(f"{group.get('name', index)} ({count:,} numbers at learning rate {rate})")
    lines.append(f"trained: {', '.join(groups)}")
    lines.append(
        f"steps: {run.max_steps} ({plan.steps_per_epoch} per epoch), {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, accumulation {run.config.training.gradient_accumulation_steps}, "
        f"precision {accelerator.mixed_precision}, seed {run.seed}"
    )
    return lines
