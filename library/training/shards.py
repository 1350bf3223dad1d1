"""Tensors of which each process has a part: what one process can do with its own part, and what takes all of them.

The functions take ordinary tensors, too, and leave them as they are. What says "all processes" must be called on all
of them in the same order, or they wait for each other forever.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; of an ordinary tensor all of it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_whole(own: Tensor, like: Tensor) -> Tensor:
    """The tensor, spread as ``like`` is, of which ``own`` is this process's part; it stays in its memory."""
    if not isinstance(like, DTensor):
        return own
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """All processes: an ordinary tensor, which each of them has, spread as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device_mesh.device_type), like.device_mesh, like.placements)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All processes: the whole tensors in the main process's host memory; elsewhere nothing.

    They are put together one by one, so that no device holds more than one of them whole.
    """
    main = torch.distributed.get_rank() == 0
    kept = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            # a part that waits in host memory must be on the device, where the processes can exchange it
            on_device: Any = whole.to(whole.device_mesh.device_type)
            whole = on_device.full_tensor()
        if main:
            kept[name] = whole.cpu()
    return kept


def first_non_finite(tensors: Iterable[Tensor], device: torch.device) -> int | None:
    """All processes: the place of the first tensor with a number that is not finite in any of them; None: all are fine.

    Args:
        tensors: Parts or whole ones, the same on all processes.
        device: Where processes exchange numbers.
    """
    last = 2**62
    bad = (number for number, tensor in enumerate(tensors) if not torch.isfinite(own_part(tensor)).all())
    first = torch.tensor(next(bad, last), dtype=torch.int64, device=device)
    torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
    return None if first == last else int(first)


def clip_gradients(gradients: Sequence[Tensor], limit: float, device: torch.device) -> Tensor:
    """All processes: scale the gradients so that the norm of all together is at most ``limit``; returns it before that.

    Args:
        gradients: Spread over the processes, each number in one of them.
        limit: Infinite: nothing is scaled.
        device: Where processes exchange numbers; the gradients may wait elsewhere.
    """
    own = [own_part(gradient) for gradient in gradients]
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in own]
    squares = torch.stack(norms).square().sum().to(device) if norms else torch.zeros((), device=device)
    torch.distributed.all_reduce(squares, op=torch.distributed.ReduceOp.SUM)
    norm = squares.sqrt()
    if own and limit != float("inf"):
        share = (limit / (norm + 1e-6)).clamp(max=1).to(own[0].device)  # as torch.nn.utils.clip_grad_norm_ has it
        for part in own:
            part.mul_(share.to(part.dtype))
    return norm
