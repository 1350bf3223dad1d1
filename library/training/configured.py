"""What the optimizer and its schedule have from the configuration, and take again after going back to a state."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.config.optimizer import parse_key_values


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The numbers of each parameter group, as they are now."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def changed_arguments(now: Sequence[str], before: Sequence[str]) -> set[str]:
    """The ``--optimizer_args`` that differ."""
    own, other = parse_key_values(now, "optimizer_args"), parse_key_values(before, "optimizer_args")
    return {name for name in {*own, *other} if name not in own or name not in other or own[name] != other[name]}


def take_settings(
    optimizer: Optimizer, schedule: Any, configured: Sequence[Mapping[str, Any]], arguments: Collection[str]
) -> None:
    """This gives the groups their configured learning rates and arguments; where nothing changed, no bit does.

    A schedule that is a function of the step goes on as if it had always had these rates and this length. Of any other
    the present rate changes in proportion.

    Args:
        optimizer: It was just given a saved state.
        schedule: Of the learning rate; so was it.
        configured: From ``group_settings``, before that.
        arguments: The names of the optimizer's arguments that shall be those of the configuration.
    """
    for number, (group, own) in enumerate(zip(optimizer.param_groups, configured)):
        group.update({name: own[name] for name in arguments if name in own})
        if "initial_lr" not in group:  # the optimizer sets its rate by itself
            continue
        rate, before = own["initial_lr"], group["initial_lr"]
        if rate != before:
            group["initial_lr"] = schedule.base_lrs[number] = rate
            group["lr"] = group["lr"] * (rate / before) if before else rate
        if isinstance(schedule, LambdaLR):
            group["lr"] = rate * schedule.lr_lambdas[number](schedule.last_epoch)
    if hasattr(schedule, "_last_lr"):
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
