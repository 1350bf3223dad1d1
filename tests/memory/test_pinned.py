"""Pinned memory, by a driver that only takes notes. ``tests/training/test_gpu.py`` asks a real one."""

import gc

import pytest
import torch

from library.memory import pinned

PAGE = 4096


class Driver:
    def __init__(self, code=0):
        self.code, self.registered, self.refused = code, {}, 0

    def cudaHostRegister(self, address, size, flags):
        if self.code:
            self.refused += 1
        else:
            self.registered[address] = size
        return self.code

    def cudaHostUnregister(self, address):
        del self.registered[address]
        return 0


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 3 * (1 << 20) + 256])
def test_whole_pages_are_registered_and_no_more_than_needed(driver, size):
    buffer = pinned.pinned_buffer(size)
    assert (buffer.numel(), buffer.dtype) == (size, torch.uint8)
    assert buffer.data_ptr() % PAGE == 0
    assert driver.registered == {buffer.data_ptr(): -(-size // PAGE) * PAGE}


def test_memory_is_unregistered_when_the_tensor_goes(driver):
    buffers = [pinned.pinned_buffer(5000) for _ in range(3)]
    view = buffers[1][100:200].view(torch.float32)
    del buffers[1]
    gc.collect()
    assert set(driver.registered) == {buffer.data_ptr() for buffer in buffers}
    view.fill_(1.0)  # it is ordinary memory now, and there still
    del buffers
    gc.collect()
    assert driver.registered == {}


def test_a_forked_process_leaves_the_registration_alone(driver, monkeypatch):
    buffer = pinned.pinned_buffer(5000)
    monkeypatch.setattr(pinned.os, "getpid", lambda: -1)
    del buffer
    gc.collect()
    assert len(driver.registered) == 1


def test_nothing_is_registered_for_nothing(driver):
    assert pinned.pinned_buffer(0).numel() == 0
    assert driver.registered == {}


def test_torch_pins_what_the_driver_refuses(driver, monkeypatch, caplog):
    driver.code, asked, forgotten, empty = 2, [], [], torch.empty

    def note(*arguments, pin_memory=False, **rest):
        asked.append(pin_memory)
        return empty(*arguments, **rest)

    monkeypatch.setattr(pinned.torch, "empty", note)
    monkeypatch.setattr(pinned, "_forget_error", lambda: forgotten.append(True))
    assert pinned.pinned_buffer(5000).numel() == 5000
    assert driver.refused == 1 and asked[-1] is True and forgotten
    assert "CUDA error 2" in caplog.text


def test_state_on_the_host_is_pinned_as_long_as_it_is_held(driver, monkeypatch):
    from library.memory.state_transfers import CudaStateTransfers

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    transfers = CudaStateTransfers(torch.device("cuda"))
    likes = [torch.rand(40, 30).t(), torch.zeros(5000, dtype=torch.int16), torch.zeros(7, dtype=torch.bfloat16)]
    made = [transfers.host_tensor(like) for like in likes]
    gc.collect()
    for tensor, like in zip(made, likes):
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (like.shape, like.stride(), like.dtype)
        tensor.copy_(like)
        assert torch.equal(tensor, like)
    assert sorted(driver.registered.values()) == [PAGE, 2 * PAGE, 3 * PAGE]
    del made[1], tensor
    gc.collect()
    assert sorted(driver.registered.values()) == [PAGE, 2 * PAGE]
