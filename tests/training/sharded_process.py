"""Trains in one of several processes, and writes down what this process holds at the end."""

import copy
import json
import os
import resource
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from library.training import setup, sharded_states
from library.training.sharding_settings import ELEMENTWISE
from library.training.shards import clip_gradients, first_non_finite, own_part

DEVICE = torch.device("cpu")


def held(run):
    """What this process holds of the run."""
    state = [value for values in run.optimizer.state.values() for value in values.values() if value.numel() > 1]
    return {
        "kinds": sorted({type(parameter).__name__ for parameter in run.parameters}),
        "weights": sum(own_part(parameter).nbytes for parameter in run.parameters),
        "all_weights": sum(parameter.numel() * 4 for parameter in run.parameters),
        "optimizer": sum(own_part(value).nbytes for value in state),
        "all_optimizer": sum(value.numel() * 4 for value in state),
        "environment": sorted(name for name in os.environ if name.startswith("ACCELERATE_USE_")),
    }


def optimizers_differ():
    """By optimizer, how far three of its steps over parts are from three over whole weights."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    differences = {}
    for name in ELEMENTWISE:
        models = [copy.deepcopy(base), copy.deepcopy(base)]
        fully_shard(models[0])
        optimizers = [getattr(torch.optim, name)(model.parameters(), lr=0.01) for model in models]
        for step in range(3):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            for model, optimizer in zip(models, optimizers):
                model(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        pairs = zip(models[0].parameters(), models[1].parameters())
        differences[name] = max((parts.full_tensor() - whole).abs().max().item() for parts, whole in pairs)
    return differences


def numbers(run):
    """What the functions over parts say, with something odd in the last process alone."""
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    odd = [torch.zeros(2), torch.tensor([1.0, float("nan") if last else 1.0]), torch.full((1,), float("inf"))]
    gradients = [torch.full((3,), 2.0), torch.full((1,), 2.0)]  # in two processes 8 numbers of 2: a norm of 32 ** 0.5
    norm = clip_gradients(gradients, 1.0, DEVICE).item()
    return {
        "first_non_finite": first_non_finite(odd, DEVICE),
        "all_finite": first_non_finite(odd[:1], DEVICE),
        "norm": norm,
        "clipped": gradients[0][0].item(),
        "sharded": run.sharded and isinstance(run.parameters[0], DTensor),
    }


def watched(train, path):
    def train_and_write(run):
        train(run)
        found = {**held(run), **numbers(run), "optimizers": optimizers_differ()}
        Path(f"{path}{torch.distributed.get_rank()}").write_text(json.dumps(found))

    return train_and_write


def without_room(write, name):
    def limited(run, target):
        if target.name != name or torch.distributed.get_rank() == 0:
            return write(run, target)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            return write(run, target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return limited


def train_and_tell(trainer, output, found, environment, full_disk=None, **options):
    """Train in a process that ends thereafter; returns the exit code.

    Args:
        trainer: With everything else that it needs.
        output: Where it writes.
        found: The file to write to; this process's number is added.
        environment: accelerate's settings.
        full_disk: A state for which the last process has no room.
        options: Of the run.
    """
    os.environ |= environment
    if full_disk is not None:
        sharded_states.write = without_room(sharded_states.write, full_disk)
    setup.train = watched(setup.train, found)
    return trainer(output, **options)
