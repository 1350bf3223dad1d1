"""Pinned memory of just the size that is asked for.

torch's allocator of pinned memory rounds every size up to a power of two, so a block of 1.1 GiB would take two. Here
ordinary memory is registered with the driver, page by page, and unregistered when the tensor is gone.
"""

import contextlib
import logging
import os
import weakref

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_PAGE = 4096
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process


def pinned_buffer(size: int) -> Tensor:
    """So many bytes, uint8, that copies to and from a CUDA device may use while the host goes on.

    Where the driver refuses to register memory it is torch's own, rounded up.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    # whole pages of its own: a page that two registrations share can't be registered twice
    room = torch.empty(-(-size // _PAGE) * _PAGE + _PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % _PAGE
    pages = room[begin : begin + -(-size // _PAGE) * _PAGE]
    address = pages.data_ptr()
    code = int(torch.cuda.cudart().cudaHostRegister(address, pages.numel(), _PORTABLE))
    if code != 0:
        _forget_error()
        log.warning(
            "the driver can't register %.0f MiB of host memory (CUDA error %d); torch pins it, rounded up to a power "
            "of two",
            size / (1 << 20),
            code,
        )
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    buffer = pages[:size]
    # The finalizer holds what lies under the pages: they are unregistered before they can be freed.
    weakref.finalize(buffer, _unregister, address, room, os.getpid()).atexit = False
    return buffer


def _unregister(address: int, _room: Tensor, owner: int) -> None:
    if os.getpid() != owner:  # a forked worker drops its copy, and may not speak to the driver
        return
    torch.cuda.synchronize()  # a copy may be under way
    torch.cuda.cudart().cudaHostUnregister(address)


def _forget_error() -> None:
    """CUDA remembers a failed call and blames the next kernel for it: this is that kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
